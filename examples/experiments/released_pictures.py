"""Pictures as the released code of the class-specific gate has them: each animal cut out as a square of 128 pixels."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from animal_pictures import read_pictures
from frozen_animals import Animals, load_network
from torch import Tensor, nn
from torchvision.transforms import v2

from timm_csg.measuring.annotations import read_annotations

SIZE, CROPS = 128, 10
RANDOM_CROP = v2.Compose([v2.RandomCrop(SIZE, padding=16), v2.RandomHorizontalFlip()])


def cut_square(picture: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """The square around a box, black beyond the picture, resized to ``SIZE``; and the box in the result.

    Args:
        picture: uint8 [3, height, width].
        box: x0, y0, x1, y1 in pixels.

    Returns:
        Picture uint8 [3, size, size] and box [4].
    """
    corners = box.unflatten(0, (2, 2))
    side = max(1, round(float((corners[1] - corners[0]).max())))
    left, top = (corners.mean(dim=0) - side / 2).round().long().tolist()
    height, width = picture.shape[1:]
    beyond = (max(0, -left), max(0, left + side - width), max(0, -top), max(0, top + side - height))
    padded = F.pad(picture, beyond)
    left, top = left + beyond[0], top + beyond[2]
    square = padded[:, top : top + side, left : left + side]
    origin = torch.tensor([left - beyond[0], top - beyond[2]] * 2)
    return v2.functional.resize(square, [SIZE, SIZE], antialias=True), (box - origin) / side * SIZE


@torch.no_grad()
def _through_frozen(model: nn.Module, pictures: Tensor) -> Tensor:
    part = nn.Sequential(model.conv_stem, model.bn1, model.blocks[:-1])
    return torch.cat([part(images) for images in normalised(model, pictures).split(64)]).half()


def normalised(model: nn.Module, pictures: Tensor) -> Tensor:
    """uint8 pictures [pictures, 3, height, width] as the network wants them."""
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return ((pictures / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def animals(weights: str, data: Path, classes: list[str], cache: Path) -> dict:
    """Training and test animals of some classes, as pictures, boxes and what the frozen layers make of them.

    Args:
        weights: See ``load_network``.
        data: Folder of train.tar, test.tar and annotations.csv.
        classes: Folders in the archives.
        cache: File that is read if it is there, and else written.
    """
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    model = load_network(weights, len(classes)).eval()
    made, marks = {"classes": classes}, read_annotations(data / "annotations.csv")
    torch.manual_seed(0)
    for split in ("train", "test"):
        files = zip(*read_pictures(data / f"{split}.tar"), strict=True)
        pictures, names = zip(*[pair for pair in files if pair[1].split("/")[0] in classes], strict=True)
        boxes = marks.select(names).object_boxes()
        cut, boxes = zip(*[cut_square(*pair) for pair in zip(pictures, boxes, strict=True)], strict=True)
        made[f"{split}_y"] = torch.tensor([classes.index(name.split("/")[0]) for name in names])
        made[f"{split}_pictures"], made[f"{split}_boxes"] = torch.stack(cut), torch.stack(boxes)
        made[f"{split}_names"], made[split] = list(names), _through_frozen(model, torch.stack(cut))
    crops = [torch.stack([RANDOM_CROP(one) for one in made["train_pictures"]]) for _ in range(CROPS)]
    made["crops"] = [_through_frozen(model, crop) for crop in crops]
    torch.save(made, cache)
    return made


def as_animals(made: dict, rows: Tensor) -> Animals:
    """Some of the training pictures, and all test pictures."""
    crops = [crop[rows] for crop in made["crops"]]
    test = made["test"], made["test_y"], made["test_names"]
    return Animals(made["train"][rows], crops, made["train_y"][rows], *test, made["classes"])
