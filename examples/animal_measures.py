"""What animal_parts.py reports: accuracy, and how steadily filters keep their distance to head and legs."""

from __future__ import annotations

from pathlib import Path

import torch
from animal_pictures import SIZE, Pictures, as_stored
from torch import nn

from timm_csg.metrics.landmarks import read_annotations
from timm_csg.metrics.location_instability import Peaks, location_instability, peak_places
from timm_csg.metrics.receptive_field import ReceptiveField


@torch.inference_mode()
def evaluate(model: nn.Module, test: Pictures, annotations: Path, field: ReceptiveField) -> dict:
    """Accuracy, and location instability against the centres of head and legs, in image diagonals.

    A filter's own class is that with the strongest mean peak. Pictures in which a filter is silent do not count, nor
    classes with fewer than eight others; ``*_silent_too`` counts them all, as the paper does.
    """
    model.eval()
    peaks, logits = [], []
    for rows in torch.arange(len(test.targets)).split(50):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.forward_features(as_stored(test.whole[rows]))
            logits.append(model.forward_head(features).float())
            seen = model.mechanism(features) if getattr(model, "mechanism", None) is not None else features
        peaks.append(peak_places(seen.float(), field.centre_y, field.centre_x))
    strength, place = (torch.cat(parts) for parts in zip(*peaks, strict=True))
    classes = int(test.targets.max()) + 1
    own = torch.stack([strength[test.targets == index].mean(dim=0) for index in range(classes)]).argmax(dim=0)
    marks = read_annotations(annotations).select(test.names)
    columns = [marks.point_names.index(name) for name in ("head", "legs")]
    points = marks.points[:, columns] / marks.sizes[:, None] * SIZE
    result = {"accuracy": float((torch.cat(logits).argmax(dim=1) == test.targets).float().mean())}
    for name, drop_silent in (("", True), ("_silent_too", False)):
        found = location_instability(
            Peaks(strength, place, test.targets, (SIZE, SIZE)), points, classes, drop_silent=drop_silent
        )
        deviations = found.deviations.masked_fill(found.images < 8, torch.nan)
        found = found._replace(deviations=deviations)
        result[f"instability{name}"] = float(found.per_class.nanmean())
        result[f"instability_own_class{name}"] = float(found.by_owner(own).nanmean())
        result[f"instability_best_class{name}"] = found.multi_class
    return result | {"silent": float((strength <= 0).float().mean())}
