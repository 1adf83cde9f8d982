"""From features of any layout to maps [batch, filters, height, width]; for tokens, where they stand in the image."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from timm_csg.stage import is_channels_last


def to_maps(model: Any, features: Tensor, images: Tensor) -> Tensor:
    """Features as maps [batch, filters, height, width]; prefix tokens (class, registers) are left out.

    Args:
        model: The timm model, inside ``borrowed``.
        features: Its features, or a tensor of their shape.
        images: The images they belong to.

    Raises:
        ValueError: If the features are tokens without a grid.
    """
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if is_channels_last(model) else features
    (height, width), prefix = token_grid(model, features, images)
    tokens: Tensor = features[:, prefix:].transpose(1, 2)
    return tokens.reshape(*tokens.shape[:2], height, width)


def token_grid(model: Any, features: Tensor, images: Tensor) -> tuple[tuple[int, int], int]:
    """Height and width of the grid of tokens, and the number of prefix tokens.

    The patch embedding says it for ViTs. For other token models timm's ``forward_intermediates`` returns a map, and the
    grid counts as found if its positions hold the tokens of the features, in their order.

    Raises:
        ValueError: If there is no grid.
    """
    kind = type(model).__name__
    if features.ndim == 3:
        prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
        grid = _patch_grid(model, images)
        if grid is not None and grid[0] * grid[1] == features.shape[1] - prefix:
            return grid, prefix
        grid = _intermediate_grid(model, images)
        if grid is not None:
            return grid, 0
    raise ValueError(
        f"the features of {kind} have shape {list(features.shape)} and do not form a grid over the image, so there "
        "are no maps; explain.gradient works for every model, and explain.class_filters needs no grid."
    )


def _patch_grid(model: Any, images: Tensor) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    if embed is None:
        return None
    if getattr(embed, "grid_size", None) is not None and tuple(embed.img_size or ()) == tuple(images.shape[-2:]):
        return int(embed.grid_size[0]), int(embed.grid_size[1])
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return int(height), int(width)
    return None


@torch.no_grad()
def _intermediate_grid(model: Any, images: Tensor) -> tuple[int, int] | None:
    if not hasattr(model, "forward_intermediates"):
        return None
    image = images[:1].to(next(model.parameters()))
    tokens = model.forward_features(image)
    options = inspect.signature(model.forward_intermediates).parameters
    for norm in (True, False) if "norm" in options else (None,):
        try:
            chosen = {"indices": 1, "intermediates_only": True, **({} if norm is None else {"norm": norm})}
            last = model.forward_intermediates(image, **chosen)[-1]
        except (AssertionError, RuntimeError, ValueError, TypeError):
            continue  # some models cannot normalise intermediates
        if not isinstance(last, Tensor) or last.ndim != 4:
            continue
        found = last.flatten(2).transpose(1, 2)
        if found.shape == tokens.shape and torch.allclose(found, tokens, rtol=1e-3, atol=1e-5):
            return int(last.shape[2]), int(last.shape[3])
    return None
