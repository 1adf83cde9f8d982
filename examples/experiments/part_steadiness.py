"""Where the filters of parts_and_owners.py answer, and how steadily they keep their distance to head and legs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from frozen_animals import as_float
from torch import Tensor, nn

from timm_csg.measuring.annotations import read_annotations
from timm_csg.measuring.fields import ReceptiveField
from timm_csg.metrics.instability import Peaks, location_instability, peak_places

PARTS = ("head", "legs")


class Marks(NamedTuple):
    """Centres of head and legs in pixels of the network's input [pictures, 2, 2], NaN where not annotated."""

    train: Tensor
    test: Tensor

    @classmethod
    def read(cls, file: Path, made: dict, size: int) -> Marks:
        """Of whole pictures that were resized to a square."""
        found = []
        for split in ("train", "test"):
            marks = read_annotations(file).select(made[f"{split}_names"])
            columns = [marks.point_names.index(name) for name in PARTS]
            found.append(marks.points[:, columns] / marks.sizes[:, None] * size)
        return cls(*found)


@torch.inference_mode()
def places(
    model: nn.Module, features: Tensor, targets: Tensor, field: ReceptiveField, size: int
) -> tuple[Peaks, Tensor]:
    """Where each filter answers most, behind the mask if there is one; and the mean of its map [pictures, filters]."""
    found, means = [], []
    for part in features.split(100):
        maps = model.forward_features(as_float(part))
        seen = model.mechanism(maps) if getattr(model, "mechanism", None) is not None else maps
        found.append([tensor.cpu() for tensor in peak_places(seen, field.centre_y, field.centre_x)])
        means.append(seen.mean(dim=(2, 3)).cpu())
    strength, place = (torch.cat(column) for column in zip(*found, strict=True))
    return Peaks(strength, place, targets.cpu(), (size, size)), torch.cat(means)


def steadiness(peaks: Peaks, means: Tensor, marks: Tensor, owners: Tensor | None) -> dict[str, float]:
    """Location instability in image diagonals, without silent pictures, nor values of fewer than eight.

    ``own_class``: on the class with the largest mean response, the paper's category; ``owner``: on the assigned one;
    ``moved``: with the landmarks of the next picture of the class, which must be worse for filters on parts.
    """
    classes = int(peaks.targets.max()) + 1
    members = [(peaks.targets == index).nonzero()[:, 0] for index in range(classes)]
    category = torch.stack([means[rows].mean(dim=0) for rows in members]).argmax(dim=0)
    following = torch.empty_like(peaks.targets)
    for rows in members:
        following[rows] = rows.roll(1)
    result = {}
    for name, points in (("", marks), ("_moved", marks[following])):
        found = location_instability(peaks, points, classes, drop_silent=True)
        found = found._replace(deviations=found.deviations.masked_fill(found.images < 8, torch.nan))
        result[f"all_classes{name}"] = float(found.per_class.nanmean())
        result[f"own_class{name}"] = float(found.by_owner(category).nanmean())
        result[f"best_class{name}"] = found.multi_class
        if owners is not None:
            result[f"owner{name}"] = float(found.by_owner(owners.float().argmax(dim=0)).nanmean())
    middle = peaks._replace(
        strength=torch.ones(len(marks), 1), place=torch.full((len(marks), 1, 2), peaks.image_size[0] / 2)
    )
    result["middle"] = float(location_instability(middle, marks, classes).per_class.nanmean())
    cut_off = peaks.strength >= 6
    return result | {"silent": float((peaks.strength <= 0).float().mean()), "saturated": float(cut_off.float().mean())}
