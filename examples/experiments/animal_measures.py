"""What animal_parts.py reports: accuracy, and how steadily filters keep their distance to head and legs."""

from __future__ import annotations

from pathlib import Path

import torch
from animal_pictures import SIZE, Pictures, as_stored
from torch import nn

from timm_csg.measuring.annotations import read_annotations
from timm_csg.measuring.fields import ReceptiveField
from timm_csg.metrics.instability import LocationInstability, Peaks, location_instability, peak_places
from timm_csg.metrics.predictions import accuracy


@torch.inference_mode()
def answers(model: nn.Module, test: Pictures, field: ReceptiveField) -> tuple[Peaks, torch.Tensor, torch.Tensor]:
    """Where each filter answers most in each picture, behind the mask if there is one; sums of its map; logits."""
    model.eval()
    peaks, sums, logits = [], [], []
    for rows in torch.arange(len(test.targets)).split(50):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.forward_features(as_stored(test.whole[rows]))
            logits.append(model.forward_head(features).float())
            seen = model.mechanism(features) if getattr(model, "mechanism", None) is not None else features
        peaks.append(peak_places(seen.float(), field.centre_y, field.centre_x))
        sums.append(seen.float().sum(dim=(2, 3)))
    strength, place = (torch.cat(parts) for parts in zip(*peaks, strict=True))
    return Peaks(strength, place, test.targets, (SIZE, SIZE)), torch.cat(sums), torch.cat(logits)


def landmarks(test: Pictures, annotations: Path) -> torch.Tensor:
    """Centres of head and legs in pixels of what the model sees [pictures, 2, 2], NaN where not annotated."""
    marks = read_annotations(annotations).select(test.names)
    columns = [marks.point_names.index(name) for name in ("head", "legs")]
    corner, opposite = test.regions.unflatten(1, (2, 2)).unbind(dim=1)
    return (marks.points[:, columns] - corner[:, None]) / (opposite - corner)[:, None] * SIZE


def _of_eight_or_more(found: LocationInstability) -> LocationInstability:
    """Without the values of fewer than eight pictures."""
    return found._replace(deviations=found.deviations.masked_fill(found.images < 8, torch.nan))


def evaluate(
    model: nn.Module, test: Pictures, annotations: Path, field: ReceptiveField, *, one_class: bool = False
) -> dict:
    """Accuracy, and location instability against the centres of head and legs, in image diagonals.

    A filter's own class is the paper's category, that with the largest mean sum of its map. Pictures in which a filter
    is silent do not count, nor classes with fewer than eight others; ``*_silent_too`` counts them all, as the paper
    does. To compare with: ``middle``, a filter that always answers in the middle, and ``shuffled``, the landmarks of
    the next picture of the class. With ``one_class`` the instability is that of class 1 alone.
    """
    peaks, sums, logits = answers(model, test, field)
    points, classes = landmarks(test, annotations), int(test.targets.max()) + 1
    if one_class:
        points[test.targets == 0] = torch.nan
    members = [(test.targets == index).nonzero()[:, 0] for index in range(classes)]
    own = torch.stack([sums[rows].mean(dim=0) for rows in members]).argmax(dim=0)
    result = {"accuracy": accuracy(logits, test.targets)}
    for name, drop_silent in (("", True), ("_silent_too", False)):
        found = _of_eight_or_more(location_instability(peaks, points, classes, drop_silent=drop_silent))
        result[f"instability{name}"] = float(found.per_class.nanmean())
        result[f"instability_own_class{name}"] = float(found.by_owner(own).nanmean())
        result[f"instability_best_class{name}"] = found.multi_class
    middle = torch.full((len(points), 1, 2), SIZE / 2)
    fixed = location_instability(peaks._replace(strength=torch.ones(len(points), 1), place=middle), points, classes)
    following = torch.empty_like(test.targets)
    for rows in members:
        following[rows] = rows.roll(1)
    shuffled = _of_eight_or_more(location_instability(peaks, points[following], classes, drop_silent=True))
    for name, found in (("middle", fixed), ("shuffled", shuffled)):
        result[f"instability_{name}"] = float(found.per_class.nanmean())
        result[f"instability_best_class_{name}"] = found.multi_class
    result["instability_own_class_shuffled"] = float(shuffled.by_owner(own).nanmean())
    result["saturated"] = float((peaks.strength >= 6).float().mean())  # ReLU6 cuts peaks off
    return result | {"silent": float((peaks.strength <= 0).float().mean())}
