"""GradMap: localisation by the gradients of a class's strongest filters, after the code of Liang et al., ECCV 2020."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import whole
from timm_csg.measuring.localisation import Loader, Progress, batches, scored
from timm_csg.metrics.localisation import Localisation
from timm_csg.metrics.regions import overlap
from timm_csg.running import measured
from timm_csg.stage import seen_maps


def gradmap(
    model: nn.Module,
    loader: Loader,
    objects: Tensor,
    *,
    filters_per_class: int = 30,
    sigma: float | None = None,
    threshold: float = 1.0,
    progress: Progress = None,
) -> Localisation:
    """GradMap: where the gradient of a class's strongest filters is above its mean energy.

    For each class the filters with the largest mean activation on its images. For an image and each of these filters:
    gradient of the filter's spatial mean with respect to the image, its length over the colours, divided by its root
    mean square over the pixels, blurred (Gaussian, kernel of 2 x sigma + 1 pixels, mirrored at the border), above
    ``threshold``. An image's score is the mean intersection over union of these filters. Where a filter does not
    respond at all its gradient is 0, and so is its score.

    Args:
        model: A timm classifier whose features are a map; its modes and gradients are left as found.
        loader: Yields (images, class indices), not shuffled; it is read twice.
        objects: Boxes [images, 4] in pixels of the input, or masks, bool [images, height, width]. Images with a box of
            NaN are left out.
        filters_per_class: One backward pass for each, for every batch.
        sigma: Of the blur, in pixels; the authors' 30 pixels of 128 in proportion if left out.
        threshold: In units of the root mean square.
        progress: Called with the number of images after each batch of the second reading.

    Returns:
        Scores for each class and for all images; the authors report Avg-IoU and AP20.

    Raises:
        ValueError: If ``filters_per_class`` is no whole number or below 1, or the objects do not suit the images.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]
        >>> gradmap(model, loader, torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 2), filters_per_class=2).counts
        tensor([1, 1])
    """
    if (whole(filters_per_class) or 0) < 1:
        raise ValueError(f"filters_per_class must be a whole number, 1 or more, but is {filters_per_class!r}.")
    strongest = _strongest_filters(model, loader, objects, filters_per_class)
    device = next(model.parameters()).device

    def score(images: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        images = images.requires_grad_()
        with torch.enable_grad():
            means = seen_maps(model, images).flatten(2).mean(dim=2)
            chosen = means.gather(1, strongest[targets].to(device)).sum(dim=0)
        blur_y, blur_x = (_blur(side, sigma, device) for side in images.shape[2:])
        total = torch.zeros(len(images), device="cpu")
        for index in range(len(chosen)):
            (gradient,) = torch.autograd.grad(chosen[index], images, retain_graph=index + 1 < len(chosen))
            length = gradient.float().norm(dim=1)
            length = length / length.square().mean(dim=(1, 2), keepdim=True).sqrt()
            total += overlap((blur_y @ length @ blur_x.T > threshold).cpu(), masks)
        return total / len(chosen)

    with measured(model):
        return scored(score, model, loader, objects, progress)


@torch.no_grad()
def _strongest_filters(model: nn.Module, loader: Loader, objects: Tensor, number: int) -> Tensor:
    """For each class the filters with the largest mean activation on its images [classes, number]."""
    means, classes = [], []
    with measured(model):
        for images, targets, _ in batches(model, loader, objects):
            means.append(seen_maps(model, images).float().mean(dim=(2, 3)).cpu())
            classes.append(targets)
    values, targets = torch.cat(means), torch.cat(classes)
    totals = torch.zeros(int(targets.max()) + 1, values.shape[1], device="cpu").index_add_(0, targets, values)
    return totals.topk(min(number, values.shape[1]), dim=1).indices


def _blur(side: int, sigma: float | None, device: torch.device) -> Tensor:
    """Gaussian blur along one axis as a matrix [side, side], mirrored at the border without repeating it."""
    width = 30 / 128 * side if sigma is None else sigma
    radius = min(round(width), side - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device="cpu")
    kernel = torch.exp(-(offsets**2) / (2 * width**2)) if width > 0 else torch.ones(1, device="cpu")
    each = torch.eye(side, device="cpu")[:, None]
    padded = F.pad(each, (radius, radius), mode="reflect") if radius else each
    return F.conv1d(padded, (kernel / kernel.sum())[None, None])[:, 0].T.to(device)
