"""Localisation: how well the filters' gradients and maps cover the object, without having seen a box in training.

The three protocols of the code of Liang et al., ECCV 2020 (https://arxiv.org/abs/2007.08194), with its thresholds. The
numbers of the paper itself are not known to us.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.metrics.display import in_one_line
from timm_csg.metrics.regions import check_regions, overlap, region_masks


@in_one_line
class Localisation(NamedTuple):
    """Overlap of predictions and objects; NaN for a class without images (or, for ``activmap``, without filters).

    Attributes:
        iou: Mean intersection over union of each class (Avg-IoU), float32 [classes].
        ap20: Share with an intersection over union of 0.2 or more [classes].
        ap30: The same for 0.3 [classes].
        total_iou: Over all images (``activmap``: filters), whatever their class.
        total_ap20: The same.
        total_ap30: The same.
        counts: Images (``activmap``: filters) of each class, int64 [classes].
    """

    iou: Tensor
    ap20: Tensor
    ap30: Tensor
    total_iou: float
    total_ap20: float
    total_ap30: float
    counts: Tensor


def whole_image(objects: Tensor, targets: Tensor, image_size: tuple[int, int]) -> Localisation:
    """The baseline that answers "everywhere": what a score has to be compared with.

    Args:
        objects: Boxes [images, 4] in pixels of the input, or masks, bool [images, height, width].
        targets: Class indices [images].
        image_size: Height and width of the input.

    Returns:
        The overlap of the whole image with the objects, as ``gradmap`` returns it.

    Example:
        >>> whole_image(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([0]), (2, 2)).iou
        tensor([0.5000])
    """
    check_regions(objects, len(targets), 2, image_size, "objects")
    masks = region_masks(objects, slice(None), *image_size)
    return per_image(overlap(torch.ones_like(masks), masks), targets, masks.flatten(1).any(dim=1))


def per_image(scores: Tensor, targets: Tensor, seen: Tensor) -> Localisation:
    """Summary of one score for each image; images without an object (``seen`` is False) are left out."""
    scores, targets = scores[seen].double(), targets[seen].cpu()
    if len(scores) == 0:
        raise ValueError("no image contains an object; check that the boxes are in pixels of the model's input.")
    num_classes = int(targets.max()) + 1
    counts = torch.bincount(targets, minlength=num_classes)
    values = [scores, (scores >= 0.2).double(), (scores >= 0.3).double()]
    per_class = [(torch.bincount(targets, weights=value, minlength=num_classes) / counts).float() for value in values]
    totals = [float(value.mean()) for value in values]
    return Localisation(per_class[0], per_class[1], per_class[2], totals[0], totals[1], totals[2], counts)
