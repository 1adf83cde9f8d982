"""What happens to each class when the filters of one class are removed, or when only these are kept.

The authors close filters at test time and watch the classes disappear (Liang et al., ECCV 2020, section 4); a model
whose filters have owners loses exactly the class whose filters are gone. That hides the class from this classifier and
does not delete it: ``relearning`` asks what the other filters still know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.checks import check_class_indices, whole
from timm_csg.metrics._checks import check_features, check_rows, class_counts
from timm_csg.metrics.display import in_one_line

_LOGITS_AT_ONCE = 2**22
_STEPS = 2.0**24  # of the largest logit: differences that float32 does not see decide nothing


@in_one_line
class Ablation(NamedTuple):
    """Accuracies of the standard path, no unit, NaN for classes without samples.

    Attributes:
        before: Accuracy of each class with all filters [classes].
        after: Accuracy of each class (column) without the filters of a class (row), or with these alone
            [classes, classes].
    """

    before: Tensor
    after: Tensor

    @property
    def own(self) -> float:
        """Mean accuracy of a class without its own filters; near 0 if nobody else can stand in for them.

        With ``keep_only``: with its own filters alone; near its accuracy before if they are all it needs.
        """
        return float(self.after.diagonal().nanmean())

    @property
    def others(self) -> float:
        """Mean accuracy of the classes whose filters were left; unchanged if filters have one owner each.

        With ``keep_only``: of the classes whose filters were removed; near 0 then.
        """
        seen = int((~self.before.isnan()).sum())
        cells = len(self.after) * seen - min(seen, len(self.after.diagonal()))
        total = float(self.after.nansum() - self.after.diagonal().nansum())  # no copy of all but the diagonal
        return total / cells if cells else float("nan")


def ablate_linear(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filter_owners: Tensor,
    *,
    keep_only: bool = False,
) -> Ablation:
    """What removing filters does to a linear head, from collected responses; for other heads ``measuring.ablate``.

    Args:
        features: Pooled responses [samples, filters], as the classifier gets them.
        targets: Class indices [samples].
        weight: The classifier's weight [classes, filters].
        bias: Its bias [classes], or None.
        filter_owners: The class that owns each filter, integers [filters]: ``owners(gate)`` or
            ``owners(mutual_information)``. Or which filters are each class's, bool [classes, filters]: ``gate > 0.5``,
            or ``top_filters``, with which every class and model loses equally many.
        keep_only: Set all filters but those of the class to zero instead.

    Returns:
        The accuracies, on the CPU.

    Raises:
        TypeError, ValueError: If the arguments do not fit each other.

    Example:
        >>> features, targets = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 1])
        >>> ablate_linear(features, targets, torch.eye(2), None, torch.tensor([0, 1])).after
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    check_features(features)
    class_counts(targets, len(weight))
    check_rows(features, targets)
    tally = Tally(filter_owners, len(weight), keep_only)
    if not weight.shape[1] == features.shape[1] == tally.kept.shape[1]:
        raise ValueError(
            f"features, weight and owners must be of the same filters, but there are {features.shape[1]}, "
            f"{weight.shape[1]} and {tally.kept.shape[1]}; for a head that is not linear use measuring.ablate."
        )
    values = weight.detach().to(features.device).double()
    offset = values.new_zeros(len(values)) if bias is None else bias.detach().to(values)
    rows = max(1, _LOGITS_AT_ONCE // len(weight))
    for part, labels in zip(features.detach().split(rows), targets.split(rows), strict=True):
        tally.add(hits_of_product(part, labels, values, offset, tally.kept), labels)
    return tally.result()


class Tally:
    """Right answers for each set of filters that is kept: all, and those that differ among the classes' sets."""

    def __init__(self, filter_owners: Tensor, num_classes: int, keep_only: bool) -> None:
        own, self.set_of_class = own_filters(filter_owners, num_classes).cpu().unique(dim=0, return_inverse=True)
        self.kept = torch.cat([torch.ones_like(own[:1]), own if keep_only else ~own])  # [1 + sets, filters]
        self.correct = torch.zeros(len(self.kept), num_classes, dtype=torch.float64, device="cpu")
        self.count = torch.zeros(num_classes, dtype=torch.float64, device="cpu")

    def add(self, hits: Tensor, targets: Tensor) -> None:
        """Count right answers [1 + sets, batch]."""
        targets = targets.cpu().long()
        check_class_indices(targets, len(self.count))
        self.correct.index_add_(1, targets, hits.cpu().double())
        self.count += torch.bincount(targets, minlength=len(self.count))

    def result(self) -> Ablation:
        accuracies = self.correct / self.count
        return Ablation(before=accuracies[0], after=accuracies[1:][self.set_of_class])


def hits_of_product(pooled: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    """Whether each image is named right by the kept filters alone, bool [sets, batch]; one product for all sets."""
    pooled, targets, kept = pooled.to(weight), targets.to(weight.device), kept.to(weight.device)
    by_filter = weight.T.contiguous()
    total = pooled @ by_filter
    steps = _STEPS / (total.abs().amax(dim=1, keepdim=True) + bias.abs().amax()).clamp_min(1e-300)
    hits = torch.empty(len(kept), len(pooled), dtype=torch.bool, device=pooled.device)
    for index, row in enumerate(kept):
        is_short = 2 * int(row.sum()) <= len(row)
        filters = (row if is_short else ~row).nonzero().flatten()
        part = pooled[:, filters] @ by_filter[filters]
        logits = (part if is_short else total - part) + bias
        hits[index] = (logits * steps).round().argmax(dim=1) == targets
    return hits


def own_filters(filter_owners: Tensor, num_classes: int) -> Tensor:
    """Bool [classes, filters]."""
    if filter_owners.dtype == torch.bool and filter_owners.ndim == 2:
        if len(filter_owners) != num_classes:
            raise ValueError(f"there are {num_classes} classes, but filter_owners has {len(filter_owners)} rows.")
        return filter_owners
    if filter_owners.ndim != 1 or filter_owners.is_floating_point() or filter_owners.dtype == torch.bool:
        raise ValueError(
            "filter_owners must be class indices [filters] or bool [classes, filters], but is "
            f"{filter_owners.dtype} {list(filter_owners.shape)}; pass owners(gate) or gate > 0.5."
        )
    return filter_owners.cpu()[None] == torch.arange(num_classes, device="cpu")[:, None]


def top_filters(class_filter_matrix: Tensor, count: int | Sequence[int]) -> Tensor:
    """The filters that serve or tell about each class most: so many for each class, whoever owns them.

    For ``measuring.ablate``: a standard model's filters ranked by mutual information, as many for each class as a gated
    model's class owns (``filters_per_class(gate).tolist()``), so that both lose the same number. A filter can be in
    several classes' rows.

    Args:
        class_filter_matrix: Gate or mutual information [classes, filters].
        count: Filters for each class, one number or one per class.

    Returns:
        Bool [classes, filters]; the first filters where several tie.

    Raises:
        ValueError: If there is not one count for each class, or a class is to have more filters than there are.

    Example:
        >>> top_filters(torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.3, 0.1]]), [2, 1])
        tensor([[ True, False,  True],
                [False,  True, False]])
    """
    num_classes, num_filters = class_filter_matrix.shape
    one = whole(count)
    counts = torch.tensor([one] * num_classes if one is not None else list(count), device="cpu")  # type: ignore[arg-type]
    if len(counts) != num_classes or bool(((counts < 0) | (counts > num_filters)).any()):
        raise ValueError(
            f"count must be one number or {num_classes} numbers between 0 and {num_filters} filters, but is {count}."
        )
    order = class_filter_matrix.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_filters, device=order.device).expand_as(order))
    return rank < counts.to(order.device)[:, None]
