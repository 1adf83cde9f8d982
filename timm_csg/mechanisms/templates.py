"""Templates of part filters: where they sit, how well it fits templates, and what its fits tell about it.

The formulas of Zhang, Wu and Zhu, CVPR 2018 (https://arxiv.org/abs/1710.00935), as functions of tensors; ``icnn.py``
puts them together. None makes a tensor of [filters, batch, templates, height, width]: a map's fits with all templates
are one matrix product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TEMPERATURE = 0.5  # of the released variant
_RELEASED_SCALE = 1e-5  # the released variant's factor on the gradient at one position


def centre_of_gravity(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded row and column of the mean position, weighted by the values; the middle for a map of zeros.

    Args:
        maps: [..., height, width], 0 or more.

    Example:
        >>> centre_of_gravity(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        (tensor(0), tensor(1))
    """
    height, width = maps.shape[-2:]
    total = maps.sum(dim=(-2, -1))
    found = []
    for size, profile in ((height, maps.sum(dim=-1)), (width, maps.sum(dim=-2))):
        mean = profile @ torch.arange(size, device=maps.device, dtype=maps.dtype) / total
        found.append(torch.where(total > 0, mean, (size - 1) / 2).round().long())
    return found[0], found[1]


def part_template(row: Tensor, column: Tensor, height: int, width: int, beta: float | Tensor) -> Tensor:
    """Positive templates without the factor τ: max(1 − β ‖[i, j] − [row, column]‖₁ / n, −1), n = √(height · width).

    Zhang et al., CVPR 2018. For maps that are not square n is ours; a template stays as wide as it is high.

    Args:
        row: Positions [...].
        column: Positions [...].
        height: Of the map.
        width: Of the map.
        beta: One number, or a tensor that broadcasts with [..., height, width].

    Returns:
        [..., height, width] in [-1, 1], float32.

    Example:
        >>> part_template(torch.tensor(0), torch.tensor(1), 2, 2, beta=1.0)
        tensor([[0.5000, 1.0000],
                [0.0000, 0.5000]])
    """
    down = (torch.arange(height, device=row.device) - row[..., None]).abs()
    across = (torch.arange(width, device=row.device) - column[..., None]).abs()
    distance = (down[..., :, None] + across[..., None, :]).float() / math.sqrt(height * width)
    return (1 - beta * distance).clamp(min=-1)


def template_table(height: int, width: int, beta: float, device: torch.device | None = None) -> Tensor:
    """The positive templates of all positions, without τ: [positions of the peak, positions]."""
    index = torch.arange(height * width, device=device)
    return part_template(index // width, index % width, height, width, beta).flatten(1)


def template_fits(maps: Tensor, table: Tensor, strength: float) -> Tensor:
    """Fit tr(x · T) of every map with every positive template and, last, the negative one, τ = ``strength`` / n².

    Args:
        maps: [batch, filters, positions].
        table: From ``template_table``.
        strength: n² τ.

    Returns:
        [batch, filters, positions + 1].
    """
    tau = strength / maps.shape[-1]
    return tau * torch.cat([maps @ table.T, -maps.sum(dim=-1, keepdim=True)], dim=-1)


def information_terms(fits: Tensor, log_z: Tensor) -> Tensor:
    """The terms p(T) p(x|T) log(p(x|T) / p(x)) of the mutual information between maps and templates.

    p(x|T) = exp(tr(x · T)) / Z_T, with Z_T the sum over maps: here the batch size times exp(``log_z``); all templates
    have the prior 1 / (n² + 1). Their sum over images and templates is MI(X; T) in nats, and the derivative of the
    mutual information with respect to a fit, Z_T held fixed, is again this term.

    Args:
        fits: [batch, filters, templates], see ``template_fits``.
        log_z: Logarithm of the mean of exp(fits) over maps, [filters, templates].

    Returns:
        [batch, filters, templates].
    """
    batch, _, templates = fits.shape
    log_given = fits - log_z - math.log(batch)
    log_joint = log_given - math.log(templates)
    return log_joint.exp() * (log_given - log_joint.logsumexp(dim=-1, keepdim=True))


def with_gradient(value: Tensor, maps: Tensor, slope: Tensor) -> Tensor:
    """``value`` [filters], whose derivative with respect to ``maps`` [batch, filters, ...] is ``slope``."""
    return value + (slope * (maps - maps.detach())).flatten(2).sum(dim=(0, 2))


def released_slope(maps: Tensor, masks: Tensor, member: Tensor, share: Tensor) -> Tensor:
    """The gradient that the authors' released code adds to the loss's derivative with respect to the maps.

    An image of a filter's category asks for more of what fits the mask, by a weight that grows with the fit it has; any
    other image asks for less everywhere. Weights are divided by their mean over the images of their kind.

    Args:
        maps: [batch, filters, height, width], 0 or more.
        masks: Positive templates at the maps' own centres, the same shape, in [-1, 1].
        member: How much each image belongs to the filter's category [batch, filters], in [0, 1].
        share: Share of the filter's category among the images [filters]; both kinds then weigh alike.

    Returns:
        [batch, filters, height, width], a mean over images.
    """
    inside, all_over = (maps * masks).mean(dim=(2, 3)), maps.mean(dim=(2, 3))
    others = (maps * masks.flip(0, 1)).mean(dim=(2, 3))  # the fit with templates at other places, as the authors do it
    log_positive = _TEMPERATURE * log_mean_exp(others / _TEMPERATURE)
    log_negative = _TEMPERATURE * log_mean_exp(-all_over / _TEMPERATURE)
    parts = []
    for fit, log_z, kind, weight in (
        (inside, log_positive, member, 0.5 / share),
        (-all_over, log_negative, 1 - member, 0.5 / (1 - share)),
    ):
        raw = ((fit - fit.amax(dim=0)) / _TEMPERATURE).exp() * (fit - log_z + _TEMPERATURE) * kind
        mean = raw.sum(dim=0) / kind.sum(dim=0)
        parts.append((raw / mean * weight).nan_to_num(0.0, 0.0, 0.0))
    return -_RELEASED_SCALE * (parts[0][..., None, None] * masks - parts[1][..., None, None]) / maps.shape[0]


def fitting_width(maps: Tensor, masks: Tensor, member: Tensor) -> Tensor:
    """Half the β that the released variant wants for each filter: 3 / (spread of its responses), within 1.5 and 3.

    Args:
        maps: [batch, filters, height, width], 0 or more.
        masks: Positive templates, the same shape.
        member: See ``released_slope``; maps weigh with their fit and with this.

    Returns:
        [filters]; the spread is in cells of a 14x14 map. NaN where nothing responds.
    """
    height, width = maps.shape[-2:]
    total = maps.sum(dim=(2, 3)).clamp_min(1e-12)
    spread = torch.zeros_like(total)
    for size, profile in ((height, maps.sum(dim=3)), (width, maps.sum(dim=2))):
        cells = torch.arange(size, device=maps.device, dtype=maps.dtype)
        mean = profile @ cells / total
        spread += profile @ cells.square() / total - mean.square()
    sigma = (spread / 2).clamp_min(0).sqrt() * 14 / math.sqrt(height * width)
    weight = (maps * masks).mean(dim=(2, 3)).clamp_min(0) * member
    return (3 * weight.sum(dim=0) / (weight * sigma).sum(dim=0)).clamp(1.5, 3.0)


def log_mean_exp(values: Tensor) -> Tensor:
    """Logarithm of the mean over images of exp(values), [batch, ...] → [...]."""
    return values.logsumexp(dim=0) - math.log(values.shape[0])


def regrid(log_z: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Logarithms of normalisers [filters, positions + 1] for maps of another size; the last, negative one stays."""
    if old == new:
        return log_z
    resized = F.interpolate(log_z[:, :-1].unflatten(1, old)[None], new, mode="bilinear", align_corners=True)
    return torch.cat([resized[0].flatten(1), log_z[:, -1:]], dim=1)


def check_grid(model: Any) -> None:
    """Raise for a model whose tokens are not a square grid, also where their number happens to be a square.

    Raises:
        ValueError: With a model or mechanism that works.
    """
    prefix = getattr(model, "num_prefix_tokens", None)  # of models with tokens
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, 1)
    if prefix or (prefix is not None and grid[0] != grid[1]):
        found = "a class or register token" if prefix else f"a grid of {grid[0]} x {grid[1]} tokens"
        raise ValueError(
            f"mechanism 'icnn' needs maps, or tokens on a square grid alone, but {type(model).__name__} has {found}; "
            "use a model without (a ViT with class_token=False, global_pool='avg' and a square img_size), or "
            "mechanism='csg' or 'assigned'."
        )


def square_grid(tokens: int) -> tuple[int, int]:
    """Height and width of the square that so many tokens form.

    Raises:
        ValueError: If they form none.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(
            f"mechanism 'icnn' needs maps, or tokens on a square grid, but there are {tokens} tokens; use a model "
            "without class and register tokens, or mechanism='csg'."
        )
    return side, side
