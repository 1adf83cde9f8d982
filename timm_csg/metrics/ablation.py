"""What happens to each class when the filters of one class are removed, or when only these are kept.

The authors close filters at test time and watch the classes disappear (Liang et al., ECCV 2020, section 4); a model
whose filters have owners loses exactly the class whose filters are gone. That hides the class from this classifier and
does not delete it: ``relearning`` asks what the other filters still know.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.checks import whole
from timm_csg.metrics._checks import check_features, check_rows, class_counts
from timm_csg.metrics._model import (
    LinearHead,
    checked_batches,
    evaluating,
    find_linear_head,
    is_channels_last,
    pooled_responses,
)
from timm_csg.metrics.display import in_one_line

_logger = logging.getLogger(__name__)
_SLOW = 60.0  # seconds of head passes that are announced
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


@torch.no_grad()
def ablate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    filter_owners: Tensor,
    num_classes: int,
    *,
    keep_only: bool = False,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ablation:
    """Accuracy of every class before and after setting one class's filters to zero, for each class in turn.

    One backbone pass for each batch. Where the head is linear, so that the responses' contributions add up to the
    logits, one matrix product serves all classes: the logits minus what the removed filters add, in float64. Any other
    head (layers between pooling and classifier, a mechanism that acts at inference) runs once for each class that owns
    filters; a warning says how long that takes if it is more than a minute. Memory: 8 x classes² bytes for the result.

    Args:
        model: A plain or differentiated timm classifier; its modes are left as found.
        loader: Yields (images, class indices).
        filter_owners: The class that owns each filter, integers [filters]: ``owners(gate)`` or
            ``owners(mutual_information)``. Or which filters are each class's, bool [classes, filters]: ``gate > 0.5``,
            or ``top_filters``, with which every class and model loses equally many.
        num_classes: Number of classes.
        keep_only: Set all filters but those of the class to zero instead.
        amp_dtype: Autocast dtype; None: no autocast.
        progress: Called with the number of images after each batch.

    Returns:
        The accuracies.

    Raises:
        ValueError: If the owners do not fit the classes or the filters.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
        >>> ablate(model, loader, torch.arange(96) % 2, num_classes=2).after.shape
        torch.Size([2, 2])
    """
    timm_model: Any = model  # its methods are not in nn.Module's type
    device = next(model.parameters()).device
    tally = _Tally(filter_owners, num_classes, keep_only)
    kept = tally.kept.to(device)
    linear, is_first = None, True
    with evaluating(model):
        for images, targets in checked_batches(loader):
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features = timm_model.forward_features(images.to(device))
                width = features.shape[1 if features.ndim == 4 and not is_channels_last(model) else -1]
                if kept.shape[1] != width:
                    raise ValueError(
                        f"the owners are of {kept.shape[1]} filters, but the stage has {width}; pass those of the same "
                        "model."
                    )
                if is_first:
                    linear = find_linear_head(model, features)
                if linear is None:
                    batches = (len(loader) if isinstance(loader, Sized) else 1) if is_first else 0
                    hits = _hits_of_passes(timm_model, features, targets.to(device), kept, batches)
            if linear is not None:
                hits = _hits_of_product(pooled_responses(model, features), targets, linear, kept)
            tally.add(hits, targets)
            is_first = False
            if progress is not None:
                progress(len(targets))
    return tally.result()


def ablate_linear(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filter_owners: Tensor,
    *,
    keep_only: bool = False,
) -> Ablation:
    """``ablate`` from responses that were already collected, for a linear head: no pass of the model at all.

    Args:
        features: Pooled responses [samples, filters], as the classifier gets them.
        targets: Class indices [samples].
        weight: The classifier's weight [classes, filters].
        bias: Its bias [classes], or None.
        filter_owners: See ``ablate``.
        keep_only: See ``ablate``.

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
    tally = _Tally(filter_owners, len(weight), keep_only)
    if not weight.shape[1] == features.shape[1] == tally.kept.shape[1]:
        raise ValueError(
            f"features, weight and owners must be of the same filters, but there are {features.shape[1]}, "
            f"{weight.shape[1]} and {tally.kept.shape[1]}; for a head that is not linear use ablate."
        )
    values = weight.detach().to(features.device).double()
    offset = values.new_zeros(len(values)) if bias is None else bias.detach().to(values)
    rows = max(1, _LOGITS_AT_ONCE // len(weight))
    for part, labels in zip(features.detach().split(rows), targets.split(rows), strict=True):
        tally.add(_hits_of_product(part, labels, LinearHead(values, offset), tally.kept), labels)
    return tally.result()


class _Tally:
    """Right answers for each set of filters that is kept: all, and those that differ among the classes' sets."""

    def __init__(self, filter_owners: Tensor, num_classes: int, keep_only: bool) -> None:
        own, self.set_of_class = own_filters(filter_owners, num_classes).cpu().unique(dim=0, return_inverse=True)
        self.kept = torch.cat([torch.ones_like(own[:1]), own if keep_only else ~own])  # [1 + sets, filters]
        self.correct = torch.zeros(len(self.kept), num_classes, dtype=torch.float64)
        self.count = torch.zeros(num_classes, dtype=torch.float64)

    def add(self, hits: Tensor, targets: Tensor) -> None:
        """Count right answers [1 + sets, batch]."""
        targets = targets.cpu().long()
        self.correct.index_add_(1, targets, hits.cpu().double())
        self.count += torch.bincount(targets, minlength=len(self.count))

    def result(self) -> Ablation:
        accuracies = self.correct / self.count
        return Ablation(before=accuracies[0], after=accuracies[1:][self.set_of_class])


def _hits_of_product(pooled: Tensor, targets: Tensor, head: LinearHead, kept: Tensor) -> Tensor:
    """Whether each image is named right by the kept filters alone, bool [sets, batch]; one product for all sets."""
    pooled, targets, kept = pooled.to(head.weight), targets.to(head.weight.device), kept.to(head.weight.device)
    by_filter = head.weight.T.contiguous()
    total = pooled @ by_filter
    steps = _STEPS / (total.abs().amax(dim=1, keepdim=True) + head.bias.abs().amax()).clamp_min(1e-300)
    hits = torch.empty(len(kept), len(pooled), dtype=torch.bool, device=pooled.device)
    for index, row in enumerate(kept):
        is_short = 2 * int(row.sum()) <= len(row)
        filters = (row if is_short else ~row).nonzero().flatten()
        part = pooled[:, filters] @ by_filter[filters]
        logits = (part if is_short else total - part) + head.bias
        hits[index] = (logits * steps).round().argmax(dim=1) == targets
    return hits


def _hits_of_passes(model: Any, features: Tensor, targets: Tensor, kept: Tensor, batches: int) -> Tensor:
    """The same by a pass of the head for each set; for a first batch, of so many, a warning if this will take long."""
    masks = kept[:, :, None, None] if features.ndim == 4 and not is_channels_last(model) else kept
    start, hits = time.perf_counter(), []
    for number, mask in enumerate(masks):
        hits.append((model.forward_head(features * mask.to(features.dtype)).argmax(dim=1) == targets).cpu())
        seconds = (time.perf_counter() - start) / (number + 1) * len(masks) * batches
        if number == min(3, len(masks) - 1) and seconds > _SLOW:
            _logger.warning(
                "the head of %s is not linear, so removing filters takes %d passes of it for each batch: about %.0f "
                "minutes in all; pass fewer images if that is too long.",
                type(model).__name__,
                len(masks),
                seconds / 60,
            )
    return torch.stack(hits)


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
    return filter_owners.cpu()[None] == torch.arange(num_classes)[:, None]


def top_filters(class_filter_matrix: Tensor, count: int | Sequence[int]) -> Tensor:
    """The filters that serve or tell about each class most: so many for each class, whoever owns them.

    For ``ablate``: a standard model's filters ranked by mutual information, as many for each class as a gated model's
    class owns (``filters_per_class(gate).tolist()``), so that both lose the same number. A filter can be in several
    classes' rows.

    Args:
        class_filter_matrix: Gate or mutual information [classes, filters].
        count: Filters for each class, one number or one per class.

    Returns:
        Bool [classes, filters]; the first filters where several tie.

    Example:
        >>> top_filters(torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.3, 0.1]]), [2, 1])
        tensor([[ True, False,  True],
                [False,  True, False]])
    """
    num_classes, num_filters = class_filter_matrix.shape
    one = whole(count)
    counts = torch.tensor([one] * num_classes if one is not None else list(count))  # type: ignore[arg-type]
    if len(counts) != num_classes or bool(((counts < 0) | (counts > num_filters)).any()):
        raise ValueError(
            f"count must be one number or {num_classes} numbers between 0 and {num_filters} filters, but is {count}."
        )
    order = class_filter_matrix.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_filters).expand_as(order).to(order.device))
    return rank < counts.to(order.device)[:, None]
