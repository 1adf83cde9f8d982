"""ActivMap: localisation by every filter's own map, after the code of Liang et al., ECCV 2020."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import check_fraction
from timm_csg.measuring.localisation import Loader, Progress, batches
from timm_csg.metrics.localisation import Localisation
from timm_csg.running import measured
from timm_csg.stage import seen_maps


def activmap(
    model: nn.Module,
    loader: Loader,
    objects: Tensor,
    *,
    share: float = 0.3,
    positive_only: bool = False,
    max_bytes: int = 2**29,
    progress: Progress = None,
) -> Localisation:
    """ActivMap: where a filter's upsampled map reaches the value that a given share of all its activations reaches.

    Intersection over union with the object for every filter and image. A filter's class is the one whose images it hits
    most often (an overlap above 0.3); it is scored there. A class's score is the mean over its filters, the total the
    mean over all filters. The authors' released code places its last, smaller batch wrongly when it looks for the
    thresholds; that is not repeated here.

    A filter of which less than ``share`` of the activations are positive gets the threshold 0, and with it the whole
    image: its score is then that of ``metrics.whole_image``, which is often good. ``positive_only`` prevents this.

    Args:
        model: A timm classifier whose features are a map; left as found.
        loader: Yields (images, class indices), not shuffled; read as often as ``max_bytes`` needs.
        objects: See ``gradmap``.
        share: Of the activations over all images and positions that reach the threshold.
        positive_only: Whether a place must also have a positive value.
        max_bytes: For the maps that are kept at a time, 4 bytes for each image, filter and position (65 MB for 800
            images, 1,280 filters and 4x4 positions; 803 MB, and so two readings, for 14x14); sorting takes the
            same again.
        progress: Called with the number of images after each batch.

    Returns:
        Scores for each class and for all filters; the authors report Avg-IoU and AP30.

    Raises:
        ValueError: If no image contains an object.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]
        >>> int(activmap(model, loader, torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 2)).counts.sum())
        96
    """
    check_fraction("share", share, 0.0, 1.0)
    tables: list[Tensor] = []
    start, num_filters = 0, 1
    while start < num_filters:
        kept, targets, masks = [], [], []
        chunk = 1
        with measured(model), torch.no_grad():
            for images, labels, truth in batches(model, loader, objects, progress):
                maps = seen_maps(model, images)
                num_filters, positions = maps.shape[1], maps.shape[2] * maps.shape[3]
                chunk = max(1, max_bytes // (4 * len(objects) * positions))
                kept.append(maps[:, start : start + chunk].float().cpu().contiguous())
                targets.append(labels)
                masks.append(truth)
        if not any(bool(truth.any()) for truth in masks):
            raise ValueError("no image contains an object; check that the boxes are in pixels of the model's input.")
        maps, classes, truth = torch.cat(kept), torch.cat(targets), torch.cat(masks)
        del kept
        tables.append(_filter_table(maps, classes, truth, share, positive_only))
        start += chunk
    iou, ap20, ap30 = torch.cat(tables, dim=2)
    best = ap30.nan_to_num(nan=-1.0).argmax(dim=0)  # [filters]
    num_classes = len(iou)
    counts = torch.bincount(best, minlength=num_classes)
    own = [table.gather(0, best[None])[0] for table in (iou, ap20, ap30)]
    sums = [torch.bincount(best, weights=values.double(), minlength=num_classes) for values in own]
    per_class = [(values / counts).float() for values in sums]
    totals = [float(values.double().mean()) for values in own]
    return Localisation(per_class[0], per_class[1], per_class[2], totals[0], totals[1], totals[2], counts)


def _filter_table(maps: Tensor, targets: Tensor, masks: Tensor, share: float, positive_only: bool) -> Tensor:
    """Mean overlap, share of at least 0.2 and of at least 0.3, for each class and filter [3, classes, filters]."""
    filters, number = maps.shape[1], int(share * len(maps) * maps.shape[2] * maps.shape[3])
    rows = maps.transpose(0, 1).reshape(filters, -1)
    lowest = rows.kthvalue(rows.shape[1] - max(number, 1) + 1, dim=1).values
    num_classes = int(targets.max()) + 1
    sums, counts = torch.zeros(3, num_classes, filters, device="cpu"), torch.zeros(num_classes, device="cpu")
    for one, target, truth in zip(maps, targets.tolist(), masks, strict=True):
        if not truth.any():
            continue
        counts[target] += 1
        inside, size = truth.flatten().float(), int(truth.sum())
        columns = torch.stack([torch.ones_like(inside), inside], dim=1)
        for first in range(0, filters, 128):  # so that the upsampled maps fit the cache
            part = slice(first, first + 128)
            heat = F.interpolate(one[None, part], truth.shape, mode="bilinear", align_corners=False)[0]
            predicted = heat >= lowest[part, None, None]
            if positive_only:
                predicted &= heat > 0
            area, shared = (predicted.flatten(1).float() @ columns).unbind(dim=1)  # a product is faster than masks
            iou = shared / (area + size - shared).clamp_min(1)
            sums[:, target, part] += torch.stack([iou, (iou > 0.2).float(), (iou > 0.3).float()])
    return sums / counts[:, None]
