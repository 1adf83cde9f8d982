"""One pass that keeps where each filter fires."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg.measuring.fields import receptive_field
from timm_csg.metrics.instability import Peaks, peak_places
from timm_csg.running import checked_batches, measured
from timm_csg.stage import is_channels_last, seen_features


@torch.no_grad()
def collect_peaks(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Peaks:
    """Run a timm model over a data set once and keep where each filter fires; maps are not kept.

    The maps are those the head sees when no label is given: behind the mask of a mechanism that acts at inference
    (ICNN), else the stage's own output.

    Args:
        model: A plain or differentiated timm classifier whose features are a map; left as found.
        loader: Yields (images, class indices), images of one size; not shuffled, so that landmarks can be matched.
        amp_dtype: Autocast dtype; None: no autocast.
        progress: Called with the number of images after each batch.

    Returns:
        The peaks; 12 bytes for each image and filter (12 MB for 800 images and 1,280 filters).

    Raises:
        ValueError: If the loader yields nothing, images of several sizes, or the model has no map.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> collect_peaks(model, [(torch.rand(3, 3, 64, 64), torch.tensor([0, 1, 1]))]).place.shape
        torch.Size([3, 96, 2])
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    image_size: tuple[int, int] | None = None
    centres: Any = None
    with measured(model):
        device = next(model.parameters()).device
        for images, targets in checked_batches(model, loader, progress):
            size = (int(images.shape[2]), int(images.shape[3]))
            if image_size is None:
                image_size, centres = size, receptive_field(model, size, channels=images.shape[1])
            if size != image_size:
                raise ValueError(
                    f"images must all have the same size, but there are {image_size} and {size}; resize them."
                )
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                maps = seen_features(model, images).float()
            found = peak_places(maps, centres.centre_y, centres.centre_x, channels_last=is_channels_last(model))
            parts.append((found[0].cpu(), found[1].cpu(), targets.cpu().long()))
    if image_size is None:
        raise ValueError("the loader is empty: it yielded no images.")
    strength, place, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    return Peaks(strength, place, targets, image_size)
