"""Regions of an image as masks, and how far two of them overlap."""

from __future__ import annotations

import torch
from torch import Tensor


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks, bool [boxes, height, width], of boxes x0, y0, x1, y1 [boxes, 4]: the pixels whose centre lies inside.

    A box of NaN has no pixels.
    """
    x0, y0, x1, y1 = boxes.float().unbind(dim=-1)
    rows, columns = torch.arange(height, device="cpu") + 0.5, torch.arange(width, device="cpu") + 0.5
    inside_y = (rows >= y0[:, None]) & (rows < y1[:, None])
    inside_x = (columns >= x0[:, None]) & (columns < x1[:, None])
    return inside_y[:, :, None] & inside_x[:, None, :]


def region_masks(regions: Tensor, rows: slice, height: int, width: int) -> Tensor:
    """Masks, bool [rows, ..., height, width], of some rows of boxes [images, ..., 4] or masks [images, ..., h, w]."""
    if is_boxes(regions):
        chosen = regions[rows]
        return box_masks(chosen.reshape(-1, 4), height, width).view(*chosen.shape[:-1], height, width)
    return regions[rows] > 0


def is_boxes(regions: Tensor) -> bool:
    """Whether regions are boxes, which are numbers with a fraction, and not masks, which are bool or whole numbers."""
    return regions.is_floating_point()


def check_regions(regions: Tensor, images: int, ndim: int, size: tuple[int, int], what: str) -> None:
    """Raise a ValueError unless there is one row for each image, of boxes or of masks as large as the images."""
    height, width = size
    shape = "[images, 4]" if ndim == 2 else "[images, parts, 4]"
    fits = regions.ndim == ndim and regions.shape[-1] == 4 if is_boxes(regions) else regions.ndim == ndim + 1
    if not fits or (not is_boxes(regions) and tuple(regions.shape[-2:]) != (height, width)):
        raise ValueError(
            f"{what} must be boxes {shape}, floating point, or masks of {height} x {width} pixels, bool, but have "
            f"shape {list(regions.shape)} and type {regions.dtype}."
        )
    if len(regions) < images:
        raise ValueError(
            f"{what} have {len(regions)} rows, but the loader yields more images; put the annotations in the loader's "
            "order with Annotations.select(dataset.filenames())."
        )


def overlap(predicted: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks along the last two dimensions; 0 where both are empty."""
    intersection = (predicted & truth).sum(dim=(-2, -1))
    union = (predicted | truth).sum(dim=(-2, -1))
    return intersection / union.clamp_min(1)
