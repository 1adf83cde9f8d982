"""From feature maps or tokens to one response for each filter."""

from __future__ import annotations

from torch import Tensor


def pool(features: Tensor, *, channels_last: bool = False) -> Tensor:
    """Mean over positions.

    Args:
        features: A map [batch, filters, height, width], its NHWC form, or tokens [batch, tokens, filters].
        channels_last: Whether a map has its filters last.

    Returns:
        [batch, filters].

    Example:
        >>> import torch
        >>> pool(torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]]))
        tensor([[2., 2.]])
    """
    if features.ndim == 4 and not channels_last:
        return features.mean(dim=(2, 3))
    return features.flatten(1, -2).mean(dim=1)
