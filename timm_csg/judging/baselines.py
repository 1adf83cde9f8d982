"""Maps that know nothing of the model. Judge them too: what they score is what a map must beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def centre_map(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    """A blob in the middle: objects are mostly there. A Gaussian with a deviation of a quarter of each side.

    Args:
        model: Not looked at.
        images: [batch, channels, height, width].
        targets: [batch]; not looked at.

    Returns:
        [batch, height, width], from 0 to 1.

    Example:
        >>> centre_map(None, torch.zeros(1, 3, 1, 3), None)
        tensor([[[0.4111, 1.0000, 0.4111]]])
    """
    height, width = images.shape[-2:]
    down, across = (
        (-(((torch.arange(size, device=images.device) + 0.5) / size - 0.5) * 4).square() / 2).exp()
        for size in (height, width)
    )
    return (down[:, None] * across).float().expand(len(images), height, width)


def noise_map(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    """Noise as coarse as the maps of last stages usually are: 7 x 7 uniform random values, up-sampled.

    Args:
        model: Not looked at.
        images: [batch, channels, height, width].
        targets: [batch]; not looked at.

    Returns:
        [batch, height, width], from 0 to 1; other values at every call.

    Example:
        >>> noise_map(None, torch.zeros(2, 3, 64, 64), None).shape
        torch.Size([2, 64, 64])
    """
    coarse = torch.rand(len(images), 1, 7, 7, device="cpu").to(images.device)
    return F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def edge_map(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    """An edge detector, the baseline of Adebayo et al. (NeurIPS 2018): length of the Sobel gradient, colours averaged.

    Args:
        model: Not looked at.
        images: [batch, channels, height, width].
        targets: [batch]; not looked at.

    Returns:
        [batch, height, width], 0 or more.

    Example:
        >>> edge_map(None, torch.zeros(1, 3, 4, 4), None).sum()
        tensor(0.)
    """
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=images.device)
    grey = F.pad(images.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    return slopes.square().sum(dim=1).sqrt()
