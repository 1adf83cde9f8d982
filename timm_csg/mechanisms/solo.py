"""The loss of assigned filters: every filter has to name its class alone, see ``assigned.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_csg.mechanisms.targets import is_soft, target_rows

_NEVER = -1e4  # a logit that no softmax notices, also in half precision


def solo_loss(evidence: Tensor, draws: Tensor, bias: Tensor, assignment: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of one filter per class, mean over draws that use every owned filter.

    In a draw, the logit of a class is the evidence of one of its filters. Where filters are shared by classes, a draw
    can hold other filters that serve the picture's class as well; these are not held against it.

    Args:
        evidence: Standardised, scaled responses [batch, filters].
        draws: Filter of each class in each draw, integers [draws, classes].
        bias: Added to each class's logit [classes].
        assignment: Whether a class owns a filter, bool [classes, filters].
        targets: Class indices [batch], soft targets (cross entropy with them) or multi-hot rows (each class present
            against all that are absent, mean over those present) [batch, classes].

    Returns:
        Scalar in nats, 0 or more.

    Example:
        >>> evidence = torch.tensor([[2.0, 1.0, 0.0, 0.0]])  # filters 0 and 1 belong to class 0, 2 and 3 to class 1
        >>> own = torch.tensor([[True, True, False, False], [False, False, True, True]])
        >>> solo_loss(evidence, torch.tensor([[0, 2], [1, 3]]), torch.zeros(2), own, torch.tensor([0]))
        tensor(0.2201)
    """
    num_draws, num_classes = draws.shape
    logits = evidence[:, draws.flatten()].unflatten(1, (num_draws, num_classes)) + bias
    if is_soft(targets):
        rows = targets.to(logits.dtype)[:, None].expand(-1, num_draws, -1)
        return F.cross_entropy(logits.flatten(0, 1), rows.flatten(0, 1))
    serves = target_rows(assignment.to(logits.dtype), targets)  # [batch, filters]
    rivals = logits.masked_fill(serves[:, draws] > 0, _NEVER).logsumexp(dim=2, keepdim=True)
    if targets.ndim == 1:
        place = targets.long()[:, None, None].expand(-1, num_draws, 1)
        return F.softplus(rivals - logits.gather(2, place)).mean()
    present = targets.to(logits.dtype)[:, None] / num_draws
    losses = (F.softplus(rivals - logits) * present).sum(dim=(1, 2))
    return (losses / targets.sum(dim=1).clamp(min=1)).mean()


def draw_table(assignment: Tensor) -> Tensor:
    """Draws of one filter per class in which every owned filter occurs; classes with fewer filters repeat theirs.

    Args:
        assignment: Whether a class owns a filter, bool [classes, filters]; every class owns at least one.

    Returns:
        Filter of each class in each draw, integers [most filters of a class, classes].

    Example:
        >>> draw_table(torch.tensor([[True, True, False], [False, False, True]]))
        tensor([[0, 2],
                [1, 2]])
    """
    if assignment.is_meta:
        return assignment.new_empty((1, len(assignment)), dtype=torch.long)
    owned = [row.nonzero()[:, 0] for row in assignment]
    longest = max(len(filters) for filters in owned)
    columns = [filters.repeat(-(-longest // len(filters)))[:longest] for filters in owned]
    return torch.stack(columns, dim=1)
