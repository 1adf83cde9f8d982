"""Filters assigned without looking at pictures."""

from __future__ import annotations

import torch
from torch import Tensor

SHARED_FILTERS = 3
"""Filters of each class where there are fewer filters than classes and the config names no number."""


def blind_assignment(num_classes: int, num_filters: int, filters_per_class: int | None = None) -> Tensor:
    """Filters assigned in turn, whatever they respond to: the fixed table that both papers argue against.

    Args:
        num_classes: Classes.
        num_filters: Filters.
        filters_per_class: Filters of each class, see ``AssignedConfig``.

    Returns:
        Bool [classes, filters].

    Example:
        >>> blind_assignment(2, 3).int()
        tensor([[1, 0, 1],
                [0, 1, 0]], dtype=torch.int32)
    """
    assignment = torch.zeros(num_classes, num_filters, dtype=torch.bool)
    if filters_per_class is None and num_filters >= num_classes:
        assignment[torch.arange(num_filters) % num_classes, torch.arange(num_filters)] = True
        return assignment
    count = min(filters_per_class or SHARED_FILTERS, num_filters)
    start = torch.arange(num_classes)[:, None] * count
    stride = 1 + start // num_filters  # the next time round, a class shares each of its filters with another one
    assignment.scatter_(1, (start + torch.arange(count) * stride) % num_filters, True)
    return assignment
