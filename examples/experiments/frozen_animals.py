"""The animal pictures as the frozen layers see them, and the part of a network that is trained on that.

All layers before the last stage are frozen, so what they make of every picture and of three random crops of it is
computed once and kept in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from animal_pictures import read_pictures
from torch import Tensor, nn
from torchvision.transforms import v2

CROPS, HELD_OUT = 3, 18


def load_network(weights: str, num_classes: int, dropout: float = 0.0, output_stride: int = 32) -> nn.Module:
    """A MobileNetV2 or EfficientNet of timm: a name, or ``local-dir:FOLDER`` for pretrained weights."""
    options = {"num_classes": num_classes, "drop_rate": dropout, "output_stride": output_stride}
    model = timm.create_model(weights, pretrained=":" in weights, **options)
    nn.init.zeros_(model.classifier.weight)
    return model.to(memory_format=torch.channels_last)


def without_frozen_layers(model: nn.Module) -> nn.Module:
    """The same network, fed with what its frozen layers make of pictures."""
    model.conv_stem = model.bn1 = nn.Identity()
    model.blocks = nn.Sequential(model.blocks[-1])
    model.pretrained_cfg = {}  # what it says of pictures holds no longer
    return model


@torch.no_grad()
def _through_frozen(model: nn.Module, pictures: list[Tensor], transform: nn.Module, *, frozen: bool) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    found = []
    for start in range(0, len(pictures), 64):
        images = torch.stack([transform(picture) for picture in pictures[start : start + 64]]).float() / 255
        images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        images = images.to(model.conv_stem.weight.device)
        found.append((model.blocks[:-1](model.bn1(model.conv_stem(images))) if frozen else images).half().cpu())
    return torch.cat(found)


def frozen_features(
    weights: str,
    data: Path,
    size: int,
    cache: Path,
    *,
    frozen: bool = True,
    output_stride: int = 32,
    device: str = "cpu",
) -> dict:
    """Features of training and test pictures and of the crops, their classes and names; from ``cache`` if it is there.

    Args:
        weights: See ``load_network``.
        data: Folder of train.tar and test.tar.
        size: Side of the square to which whole pictures and crops are resized, in pixels.
        cache: File that belongs to these weights, this size, stride and ``frozen``.
        frozen: False: no layer is frozen, so these are the pictures themselves.
        output_stride: 16: the last stages are dilated instead of having a stride, so that maps are twice as fine.
        device: Where the frozen layers run.
    """
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    model, made = load_network(weights, 20, output_stride=output_stride).eval().to(device), {}
    resize = v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    crop = [v2.RandomResizedCrop(size, scale=(0.4, 1), antialias=True), v2.RandomHorizontalFlip()]
    random_crop = v2.Compose([*crop, v2.ColorJitter(0.2, 0.2, 0.2)])
    torch.manual_seed(0)
    for split in ("train", "test"):
        pictures, names = read_pictures(data / f"{split}.tar")
        made["classes"] = sorted({name.split("/")[0] for name in names})
        made[f"{split}_names"] = names
        made[f"{split}_y"] = torch.tensor([made["classes"].index(name.split("/")[0]) for name in names])
        made[split] = _through_frozen(model, pictures, resize, frozen=frozen)
        if split == "train":
            made["crops"] = [_through_frozen(model, pictures, random_crop, frozen=frozen) for _ in range(CROPS)]
    torch.save(made, cache)
    return made


class Animals(NamedTuple):
    """Training pictures (whole, and random crops of them) and pictures to measure on; all behind the frozen layers."""

    whole: Tensor
    crops: list[Tensor]
    targets: Tensor
    test: Tensor
    test_targets: Tensor
    test_names: list[str]
    classes: list[str]

    def train(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of one crop of every picture; whole batches only."""
        batch_size = min(batch_size, len(self.targets))
        for rows in torch.randperm(len(self.targets)).split(batch_size)[: len(self.targets) // batch_size]:
            yield as_float(self.crops[epoch % len(self.crops)][rows]), self.targets[rows]

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        """The whole training pictures."""
        return [(as_float(part), labels) for part, labels in zip(*_split(self.whole, self.targets), strict=True)]

    def measured(self) -> list[tuple[Tensor, Tensor]]:
        """The whole pictures to measure on."""
        return [(as_float(part), labels) for part, labels in zip(*_split(self.test, self.test_targets), strict=True)]


def _split(*tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tensor.split(100) for tensor in tensors)


def as_float(features: Tensor) -> Tensor:
    """Float32, in the memory format of the network."""
    return features.float().contiguous(memory_format=torch.channels_last)


def choose(made: dict, *, hold_out: bool = False, classes: list[str] | None = None, per_class: int = 0) -> Animals:
    """What a run trains and measures on.

    Args:
        made: What ``frozen_features`` gave.
        hold_out: Measure on 18 training pictures of each class, which are then not trained on.
        classes: Only these.
        per_class: Train on the first so many pictures of each class; 0: on all.
    """
    targets, crops, whole = made["train_y"], made["crops"], made["train"]
    test, test_targets, names = made["test"], made["test_y"], made["test_names"]
    rows = torch.arange(len(targets))
    if hold_out:
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
        held = torch.cat([order[targets[order] == index][:HELD_OUT] for index in range(len(made["classes"]))])
        names = [made["train_names"][row] for row in held.sort().values]
        test, test_targets = whole[held.sort().values], targets[held.sort().values]
        rows = rows[~torch.isin(rows, held)]
    wanted = [made["classes"].index(name) for name in classes or made["classes"]]
    new = torch.full((len(made["classes"]),), -1)
    new[wanted] = torch.arange(len(wanted))
    parts = [rows[targets[rows] == index] for index in wanted]
    rows = torch.cat([part[:per_class] if per_class else part for part in parts]).sort().values
    seen = new[test_targets] >= 0
    names = [name for name, is_seen in zip(names, seen.tolist(), strict=True) if is_seen]
    crops = [crop[rows] for crop in crops]
    kept = [made["classes"][index] for index in wanted]
    return Animals(whole[rows], crops, new[targets[rows]], test[seen], new[test_targets][seen], names, kept)
