"""What the frozen layers make of the animal pictures of animal_parts.py, computed once and kept in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from animal_pictures import CROPS, RANDOM_CROP, RESIZE, Pictures, crop_objects, read_pictures
from torch import Tensor, nn

from timm_csg.measuring.annotations import read_annotations


@torch.no_grad()
def _through_frozen(model: nn.Module, pictures: list[Tensor], transform: nn.Module) -> Tensor:
    found = []
    for start in range(0, len(pictures), 64):
        images = torch.stack([transform(picture) for picture in pictures[start : start + 64]]).float() / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(model.blocks[:6](model.bn1(model.conv_stem(images))).bfloat16())
    return torch.cat(found).contiguous(memory_format=torch.channels_last)


def _compute(model: nn.Module, data: Path, *, objects: bool) -> dict:
    """What the cache holds; the same random crops whatever the seed of the training, whose numbers are left alone."""
    model.eval()
    made = {"objects": objects}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for split in ("train", "test"):
            pictures, made[f"{split}_names"] = read_pictures(data / f"{split}.tar")
            made[f"{split}_regions"] = torch.tensor([[0.0, 0, *picture.shape[:0:-1]] for picture in pictures])
            if objects:
                marks = read_annotations(data / "annotations.csv").select(made[f"{split}_names"])
                pictures, made[f"{split}_regions"] = crop_objects(pictures, marks)
            made[split] = _through_frozen(model, pictures, RESIZE)
            crops = range(CROPS if split == "train" else 0)
            made[f"{split}_crops"] = [_through_frozen(model, pictures, RANDOM_CROP) for _ in crops]
    return made


def frozen_features(
    model: nn.Module, data: Path, cache: Path, *, objects: bool, validate: bool
) -> tuple[Pictures, Pictures]:
    """Training and test pictures, or their main objects cut out.

    With ``validate``, 18 training pictures of each class stand in for the test pictures.

    Raises:
        ValueError: If ``cache`` holds the other kind.
    """
    if cache.is_file():
        made = torch.load(cache, weights_only=True)
    else:
        made = _compute(model, data, objects=objects)
        torch.save(made, cache)
    if made["objects"] != objects:
        kind = "objects" if made["objects"] else "whole pictures"
        raise ValueError(f"{cache} holds features of {kind}; give another --cache, or remove it.")
    found = []
    for split in ("train", "test"):
        names = made[f"{split}_names"]
        classes = sorted({name.split("/")[0] for name in names})
        targets = torch.tensor([classes.index(name.split("/")[0]) for name in names])
        found.append(Pictures(made[split], made[f"{split}_crops"], targets, names, made[f"{split}_regions"]))
    train, test = found
    if not validate:
        return train, test
    held_out = torch.zeros(len(train.targets), dtype=torch.bool)
    order = torch.randperm(len(train.targets), generator=torch.Generator().manual_seed(1))
    for index in range(int(train.targets.max()) + 1):
        held_out[order[train.targets[order] == index][:18]] = True
    return train.select((~held_out).nonzero()[:, 0]), train.select(held_out.nonzero()[:, 0])
