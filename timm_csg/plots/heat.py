"""Heat maps: one scale of colours for the report and for pictures, and the picture of a map over its image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LEVELS = 32


def heat_colours(levels: int = LEVELS) -> Tensor:
    """Colours from "no response" to "the strongest": from transparent over red to yellow.

    Args:
        levels: How many.

    Returns:
        Red, green, blue and opacity, 0 to 255, uint8 [levels, 4].

    Example:
        >>> heat_colours(3)
        tensor([[200,  20,  40,   0],
                [228,  92,  40,  82],
                [255, 225,  40, 165]], dtype=torch.uint8)
    """
    strength = torch.linspace(0, 1, levels, device="cpu")
    red, green = 200 + 55 * strength, 20 + 205 * strength**1.5
    opacity = 165 * strength
    return torch.stack([red, green, torch.full_like(red, 40), opacity], dim=1).round().to(torch.uint8)


def heat_levels(heat: Tensor, scale: float | None = None) -> Tensor:
    """A map as indices of ``heat_colours``; negative values count as no response.

    Args:
        heat: Any shape, finite.
        scale: The value of the strongest colour; None: the largest of the map.

    Returns:
        uint8, same shape; all 0 where nothing is positive.

    Example:
        >>> heat_levels(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
        tensor([[ 0,  0],
                [16, 31]], dtype=torch.uint8)
    """
    top = float(heat.max()) if scale is None else scale
    if not top > 0:
        return torch.zeros(heat.shape, dtype=torch.uint8, device="cpu")
    return (heat.detach().float().cpu() / top).clamp(0, 1).mul(LEVELS - 1).round().to(torch.uint8)


def overlay(image: Tensor, heat: Tensor, *, scale: float | None = None) -> Image.Image:
    """A map painted over its image: from transparent (no response) over red to yellow (the strongest).

    Args:
        image: [channels, height, width] with 1 or 3 channels and values from 0 to 1; outside of that they are clipped.
        heat: The map [map height, map width]; up-sampled to the image where it is smaller. Negative values stay
            transparent.
        scale: The value of the strongest colour, to compare several maps; None: the largest of this one.

    Returns:
        An RGB picture in the image's size; ``overlay(image, heat).save("why.png")`` writes it.

    Raises:
        ValueError: If the image or the map has another shape.

    Example:
        >>> overlay(torch.zeros(3, 4, 4), torch.tensor([[0.0, 1.0]])).getpixel((3, 0))
        (165, 146, 26)
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image [1 or 3 channels, height, width], but found {list(image.shape)}.")
    if heat.ndim != 2:
        raise ValueError(
            f"expected a map [height, width], but found {list(heat.shape)}; pass a single map of the batch."
        )
    size = image.shape[1:]
    if heat.shape != size:
        heat = F.interpolate(heat.detach().float()[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    colours = heat_colours()[heat_levels(heat, scale).long()].float().permute(2, 0, 1)
    opacity = colours[3:] / 255
    pixels = image.detach().float().cpu().clamp(0, 1) * 255
    mixed = (pixels * (1 - opacity) + colours[:3] * opacity).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(mixed.permute(1, 2, 0).numpy()))
