"""Localisation by CAM: how well the class activation map of the true class covers the object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from timm_csg.checks import check_fraction
from timm_csg.explain import cam
from timm_csg.metrics.localisation import Localisation, per_image
from timm_csg.metrics.regions import check_regions, overlap, region_masks
from timm_csg.running import checked_batches

Loader = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int], None] | None


def cam_localisation(
    model: nn.Module,
    loader: Loader,
    objects: Tensor,
    *,
    share: float = 0.3,
    progress: Progress = None,
) -> Localisation:
    """The strongest pixels of the class activation map of the true class, see ``explain.cam``.

    Args:
        model: A timm classifier that averages its map and applies one linear layer; left as found.
        loader: Yields (images, class indices), not shuffled.
        objects: See ``gradmap``.
        share: Of the pixels of the upsampled map that are predicted to be the object.
        progress: Called with the number of images after each batch.

    Returns:
        Scores for each class and for all images; the authors report Avg-IoU and AP30.

    Raises:
        ValueError: If the head is not an average and a linear layer.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]
        >>> cam_localisation(model, loader, torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 2)).counts
        tensor([1, 1])
    """
    check_fraction("share", share, 0.0, 1.0)

    def score(images: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        heat = cam(model, images, targets).float()
        lowest = heat.flatten(1).topk(max(1, int(heat[0].numel() * share))).values[:, -1, None, None]
        return overlap((heat >= lowest).cpu(), masks)

    return scored(score, model, loader, objects, progress)


def scored(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    model: nn.Module,
    loader: Loader,
    objects: Tensor,
    progress: Progress,
) -> Localisation:
    """Summary of the scores [batch] that a function gives to images, class indices and object masks."""
    scores, classes, seen = [], [], []
    for images, targets, masks in batches(model, loader, objects, progress):
        scores.append(score(images, targets, masks))
        classes.append(targets)
        seen.append(masks.flatten(1).any(dim=1))
    return per_image(torch.cat(scores), torch.cat(classes), torch.cat(seen))


def batches(
    model: nn.Module, loader: Loader, objects: Tensor, progress: Progress = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, class indices and object masks."""
    start = 0
    for images, targets in checked_batches(model, loader, progress):
        stop, size = start + len(images), (int(images.shape[2]), int(images.shape[3]))
        check_regions(objects, stop, 2, size, "objects")
        yield images, targets.cpu().long(), region_masks(objects, slice(start, stop), *size)
        start = stop
    if start == 0:
        raise ValueError("the loader is empty: it yielded no images.")
    if start != len(objects):
        raise ValueError(f"objects have {len(objects)} rows, but the loader yields {start} images.")
