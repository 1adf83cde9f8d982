"""Localisation: how well the filters' gradients and maps cover the object, without having seen a box in training.

The three protocols of the code of Liang et al., ECCV 2020 (https://arxiv.org/abs/2007.08194), with its thresholds. The
numbers of the paper itself are not known to us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.metrics._model import checked_batches, evaluating, seen_maps
from timm_csg.metrics._regions import check_regions, overlap, region_masks
from timm_csg.metrics.display import in_one_line

Loader = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int], None] | None


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

    Example:
        >>> whole_image(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([0]), (2, 2)).iou
        tensor([0.5000])
    """
    check_regions(objects, len(targets), 2, image_size, "objects")
    masks = region_masks(objects, slice(None), *image_size)
    return per_image(overlap(torch.ones_like(masks), masks), targets, masks.flatten(1).any(dim=1))


def cam(
    model: nn.Module,
    loader: Loader,
    objects: Tensor,
    *,
    share: float = 0.3,
    classifier_weight: Tensor | None = None,
    progress: Progress = None,
) -> Localisation:
    """CAM: the strongest pixels of the class activation map of the true class, sum_k weight[class, k] x map_k.

    Args:
        model: A timm classifier that averages its map and applies one linear layer; left as found.
        loader: Yields (images, class indices), not shuffled.
        objects: See ``gradmap``.
        share: Of the pixels of the upsampled map that are predicted to be the object.
        classifier_weight: [classes, filters]; taken from the model, and checked against its logits, if left out.
        progress: Called with the number of images after each batch.

    Returns:
        Scores for each class and for all images; the authors report Avg-IoU and AP30.

    Raises:
        ValueError: If the head is not an average and a linear layer.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]
        >>> cam(model, loader, torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 2)).counts
        tensor([1, 1])
    """
    device = next(model.parameters()).device
    scores, classes, seen = [], [], []
    with evaluating(model), torch.no_grad():
        for images, targets, masks in batches(loader, objects):
            maps = seen_maps(model, images.to(device)).float()
            if classifier_weight is None:
                classifier_weight = _class_weights(model, images.to(device), maps)
            weight = classifier_weight.to(maps)[targets.to(device)]
            heat = torch.einsum("bf,bfhw->bhw", weight, maps)
            heat = F.interpolate(heat[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
            lowest = heat.flatten(1).topk(int(heat[0].numel() * share)).values[:, -1, None, None]
            scores.append(overlap((heat >= lowest).cpu(), masks))
            classes.append(targets)
            seen.append(masks.flatten(1).any(dim=1))
            if progress is not None:
                progress(len(targets))
    return per_image(torch.cat(scores), torch.cat(classes), torch.cat(seen))


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


def batches(loader: Loader, objects: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, class indices and object masks."""
    start = 0
    for images, targets in checked_batches(loader):
        stop, size = start + len(images), (int(images.shape[2]), int(images.shape[3]))
        check_regions(objects, stop, 2, size, "objects")
        yield images, targets.cpu().long(), region_masks(objects, slice(start, stop), *size)
        start = stop
    if start == 0:
        raise ValueError("the loader is empty: it yielded no images.")
    if start != len(objects):
        raise ValueError(f"objects have {len(objects)} rows, but the loader yields {start} images.")


def _class_weights(model: Any, images: Tensor, maps: Tensor) -> Tensor:
    """The classifier's weight [classes, filters], if the logits really are mean map x weight + bias."""
    classifier = model.get_classifier()
    classifier = getattr(classifier, "fc", classifier)
    weight = getattr(classifier, "weight", None)
    weight = weight.detach().flatten(1).float() if isinstance(weight, Tensor) else None
    if weight is not None and weight.shape[1] == maps.shape[1]:
        bias = None if classifier.bias is None else classifier.bias.float()
        expected = F.linear(maps.mean(dim=(2, 3)), weight, bias)
        logits = model(images).float()
        if logits.shape == expected.shape and (logits - expected).abs().max() <= 1e-3 * (expected.abs().max() + 1e-6):
            return weight
    raise ValueError(
        f"the head of {type(model).__name__} is more than a mean over positions and one linear layer, so its maps have "
        "no weight for each class and CAM is not defined; use gradmap, activmap or Grad-CAM."
    )
