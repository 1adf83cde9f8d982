"""The loss of assigned filters: every filter has to name its class alone, see ``assigned.py``.

Where filters are shared by classes, none can: there the smallest set that tells classes apart, a pair, has to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_csg.mechanisms.targets import is_soft, target_rows

_NEVER = -1e4  # a logit that no softmax notices, also in half precision


def solo_loss(evidence: Tensor, draws: Tensor, bias: Tensor, assignment: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of one filter per class, mean over draws that use every owned filter.

    In a draw, the logit of a class is the evidence of one of its filters. Where filters are shared by classes it is the
    mean of two, and if both of a class's serve the picture's class as well, they are not held against it.

    Args:
        evidence: Standardised, scaled responses [batch, filters].
        draws: Filters of each class in each draw, integers [draws, classes, filters in a draw].
        bias: Added to each class's logit [classes].
        assignment: Whether a class owns a filter, bool [classes, filters].
        targets: Class indices [batch], soft targets (cross entropy with them) or multi-hot rows (each class present
            against all that are absent, mean over those present) [batch, classes].

    Returns:
        Scalar in nats, 0 or more.

    Example:
        >>> evidence = torch.tensor([[2.0, 1.0, 0.0, 0.0]])  # filters 0 and 1 belong to class 0, 2 and 3 to class 1
        >>> own = torch.tensor([[True, True, False, False], [False, False, True, True]])
        >>> solo_loss(evidence, torch.tensor([[[0], [2]], [[1], [3]]]), torch.zeros(2), own, torch.tensor([0]))
        tensor(0.2201)
    """
    num_draws = len(draws)
    logits = evidence[:, draws.flatten()].unflatten(1, draws.shape).mean(dim=3) + bias
    if is_soft(targets):
        rows = targets.to(logits.dtype)[:, None].expand(-1, num_draws, -1)
        return F.cross_entropy(logits.flatten(0, 1), rows.flatten(0, 1))
    serves = target_rows(assignment.to(logits.dtype), targets)  # [batch, filters]
    all_serve = serves[:, draws.flatten()].unflatten(1, draws.shape).amin(dim=3) > 0
    rivals = logits.masked_fill(all_serve, _NEVER).logsumexp(dim=2, keepdim=True)
    if targets.ndim == 1:
        place = targets.long()[:, None, None].expand(-1, num_draws, 1)
        return F.softplus(rivals - logits.gather(2, place)).mean()
    present = targets.to(logits.dtype)[:, None] / num_draws
    losses = (F.softplus(rivals - logits) * present).sum(dim=(1, 2))
    return (losses / targets.sum(dim=1).clamp(min=1)).mean()


def draw_table(assignment: Tensor) -> Tensor:
    """Draws of filters of each class in which every owned filter occurs; classes with fewer filters repeat theirs.

    One filter of a class at a time; two, each filter beside the next one, if classes share filters and own several.

    Args:
        assignment: Whether a class owns a filter, bool [classes, filters]; every class owns at least one.

    Returns:
        Integers [draws, classes, filters in a draw]: as many draws as the class with most filters owns.

    Example:
        >>> draw_table(torch.tensor([[True, True, False], [False, False, True]]))[:, :, 0]
        tensor([[0, 2],
                [1, 2]])
        >>> draw_table(torch.tensor([[True, True, False], [False, True, True]])).tolist()
        [[[0, 1], [1, 2]], [[1, 0], [2, 1]]]
    """
    if assignment.is_meta:
        return assignment.new_empty((1, len(assignment), 1), dtype=torch.long)
    owned = [row.nonzero()[:, 0] for row in assignment]
    longest = max(len(filters) for filters in owned)
    rows = [torch.stack([filters, filters.roll(-1)], dim=1) for filters in owned]
    pairs = torch.stack([row.repeat(-(-longest // len(row)), 1)[:longest] for row in rows], dim=1)
    is_shared = longest > 1 and int(assignment.sum(dim=0).max()) > 1
    return pairs if is_shared else pairs[:, :, :1]
