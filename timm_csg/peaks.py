"""Where a map peaks; a plateau, such as a ReLU6 cuts, counts as its centre."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def peak(maps: Tensor) -> Tensor:
    """Position of the largest value of every map, row by row; of equal values the one nearest to their mean place.

    Zhang et al., CVPR 2018 (https://arxiv.org/abs/1710.00935) have a template sit at the largest value. Networks that
    cut values off have many of these, and the first says where the plateau's border lies. Of several that are equally
    near, and in maps without a positive value, the first is taken. Exact for maps of up to 45 x 45 positions.

    Args:
        maps: [..., height, width].

    Returns:
        Positions row x width + column, int64 [...].

    Example:
        >>> peak(torch.tensor([[6.0, 6.0, 6.0], [0.0, 1.0, 2.0]]))
        tensor(1)
    """
    height, width = maps.shape[-2:]
    row, column = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    flat = maps.flatten(-2)
    largest = flat.amax(dim=-1, keepdim=True)
    is_largest = flat == largest
    grid = torch.meshgrid(row.float(), column.float(), indexing="ij")
    places = F.pad(torch.stack(grid, dim=-1).flatten(0, 1), (1, 0), value=1.0)  # 1, row, column
    with nullcontext() if maps.is_meta else torch.autocast(maps.device.type, enabled=False):  # meta has no autocast
        sums = (is_largest.float() @ places) * (largest > 0)
    number, rows, columns = sums[..., None].unbind(dim=-2)
    # number x squared distance from the mean place, without what is the same everywhere: whole numbers
    down, across = row * (number * row - 2 * rows), column * (number * column - 2 * columns)
    distance = (down[..., :, None] + across[..., None, :]).flatten(-2)
    return distance.masked_fill(~is_largest, torch.inf).argmin(dim=-1)
