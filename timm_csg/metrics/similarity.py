"""How alike filters are: by the weights that make them, and by their responses; within a class and across classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_similarity(weight: Tensor) -> Tensor:
    """Absolute cosine between the weights of every two filters.

    |w_i · w_j| / (‖w_i‖ ‖w_j‖), as in the heat map of the authors' notebooks (Liang et al., ECCV 2020,
    https://arxiv.org/abs/2007.08194; they subtract the identity). Independent random weights of d inputs have about
    sqrt(2 / (π d)), for example 0.033 for 576, so compare with that and not with 0.

    Args:
        weight: [filters, ...]; what follows is flattened.

    Returns:
        [filters, filters] in [0, 1], ones on the diagonal; a filter of zeros is similar to nothing.

    Example:
        >>> weight_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [3.0, 4.0]]))
        tensor([[1.0000, 1.0000, 0.6000],
                [1.0000, 1.0000, 0.6000],
                [0.6000, 0.6000, 1.0000]])
    """
    rows = F.normalize(weight.flatten(1), dim=1, eps=1e-30)
    return (rows @ rows.T).abs().clamp(max=1)


def activation_similarity(features: Tensor) -> Tensor:
    """Absolute correlation over images between the pooled responses of every two filters.

    The absolute cosine of the responses after their means are taken off. Filters of one class correlate because they
    fire for the same images, so this is high within a class for specific filters, and low across classes.

    Args:
        features: Pooled responses [samples, filters].

    Returns:
        [filters, filters] in [0, 1], ones on the diagonal; a constant filter is similar to nothing.

    Example:
        >>> activation_similarity(torch.tensor([[0.0, 5.0], [1.0, 3.0], [2.0, 1.0]]))
        tensor([[1.0000, 1.0000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    centred = features.double() - features.double().mean(dim=0)
    scale = features.double().abs().amax(dim=0).clamp_min(1e-300)
    centred = torch.where(centred.abs().amax(dim=0) > 1e-12 * scale, centred / scale, 0)  # rounding is no variance
    return weight_similarity(centred.T)


class SimilaritySummary(NamedTuple):
    """Mean similarity of pairs of filters, NaN where there is no such pair.

    Attributes:
        within: Of pairs with one owner.
        across: Of pairs with different owners.
        overall: Of all pairs, nobody's filters too.
    """

    within: float
    across: float
    overall: float


def summarize_similarity(similarity: Tensor, filter_owners: Tensor) -> SimilaritySummary:
    """Mean similarity within a class and across classes, every two different filters counted once.

    Args:
        similarity: [filters, filters], symmetric.
        filter_owners: The class of each filter [filters], -1 for nobody's: ``owners(gate)`` or
            ``owners(mutual_information)``.

    Returns:
        The means.

    Raises:
        ValueError: If the matrix does not fit the owners.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.75, 0.25], [0.75, 1.0, 0.5], [0.25, 0.5, 1.0]])
        >>> summarize_similarity(similarity, torch.tensor([0, 0, 1]))
        SimilaritySummary(within=0.75, across=0.375, overall=0.5)
    """
    if similarity.shape != (len(filter_owners), len(filter_owners)):
        raise ValueError(
            f"expected a similarity [filters, filters] of {len(filter_owners)} filters, but found "
            f"{list(similarity.shape)}; pass the owners of the same model."
        )
    filter_owners = filter_owners.to(similarity.device)
    same = filter_owners[:, None] == filter_owners
    pair, owned = torch.ones_like(same).triu(1), filter_owners >= 0
    both = pair & owned & owned[:, None]
    return SimilaritySummary(*(float(similarity[where].double().mean()) for where in (both & same, both & ~same, pair)))
