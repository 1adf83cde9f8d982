"""Which filters belong to which class: one pass over training pictures, correlations, and an optimal assignment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_csg.labels import class_names
from timm_csg.mechanisms.assigned import AssignedFilters
from timm_csg.mechanisms.blind import SHARED_FILTERS
from timm_csg.model import DifferentiatedModel
from timm_csg.responses import ResponseSums, correlation
from timm_csg.running import checked_batches, measured
from timm_csg.stage import seen_features

_logger = logging.getLogger(__name__)
CLASSES_AT_A_TIME = 4096
"""Most classes for which filters to share are found at once; the time and memory of all together grow faster."""


def assign(correlations: Tensor, filters_per_class: int | None = None) -> Tensor:
    """The assignment of filters to classes with the largest sum of correlations.

    With enough filters each serves one class; the linear assignment problem is solved exactly (SciPy's
    ``linear_sum_assignment``). With too few, every class gets ``filters_per_class`` filters in as many rounds, each
    solved exactly, in which filters are shared by as few classes as possible and two classes share as few filters;
    ``CLASSES_AT_A_TIME`` classes after each other where there are more.

    Args:
        correlations: [classes, filters].
        filters_per_class: Filters of every class; the others stay unowned. None: all filters are shared out as equally
            as their number allows; ``mechanisms.blind.SHARED_FILTERS`` if there are fewer filters than classes.

    Returns:
        Bool [classes, filters]; every class owns a filter.

    Raises:
        ValueError: If a correlation is not finite, or ``filters_per_class`` is not between 1 and the filters.

    Example:
        >>> assign(torch.tensor([[0.75, 0.8, 0.1, 0.2], [0.7, 0.1, 0.0, 0.1]])).int()
        tensor([[0, 1, 0, 1],
                [1, 0, 1, 0]], dtype=torch.int32)
    """
    num_classes, num_filters = correlations.shape
    if not correlations.isfinite().all():
        raise ValueError("correlations must be finite; look for NaN in the features.")
    if filters_per_class is None:
        filters_per_class = None if num_filters >= num_classes else min(SHARED_FILTERS, num_filters)
    elif not 1 <= filters_per_class <= num_filters:
        raise ValueError(f"filters_per_class must lie between 1 and {num_filters} filters, but is {filters_per_class}.")
    gains = correlations.double().cpu()
    if filters_per_class is not None and filters_per_class * num_classes > num_filters:
        return _shared(gains, filters_per_class)
    fewest = filters_per_class or num_filters // num_classes
    seats = torch.arange(num_classes, device="cpu").repeat(fewest)
    # The bonus is more than any exchange can gain: every class gets its fewest first.
    bonus = torch.full((len(seats), 1), 4.0, device="cpu")
    if filters_per_class is None and num_filters % num_classes:
        seats = torch.cat([seats, torch.arange(num_classes, device="cpu")])
        bonus = torch.cat([bonus, torch.zeros(num_classes, 1, device="cpu")])
    assignment = torch.zeros(num_classes, num_filters, dtype=torch.bool, device="cpu")
    rows, columns = _solve(gains[seats] + bonus)
    assignment[seats[rows], columns] = True
    return assignment


def _shared(gains: Tensor, filters_per_class: int) -> Tensor:
    """Every class gets a filter that it does not own yet, ``filters_per_class`` times.

    Better one that no class has with which it shares another already: pairs of filters then tell classes apart. So
    filters are given to as many classes at a time as there are filters, each to one of them; to more at a time only
    where that does not come out even, since a class owns nearly all filters.
    """
    one_each = _shared_in_parts(gains, filters_per_class, min(gains.shape[1], CLASSES_AT_A_TIME))
    if bool((one_each.sum(dim=1) == filters_per_class).all()):
        return one_each
    return _shared_in_parts(gains, filters_per_class, CLASSES_AT_A_TIME)


def _shared_in_parts(gains: Tensor, filters_per_class: int, at_a_time: int) -> Tensor:
    num_classes, num_filters = gains.shape
    owned = torch.zeros(num_classes, num_filters, dtype=gains.dtype, device="cpu")
    for done in range(filters_per_class):
        for part in torch.arange(num_classes, device="cpu").split(at_a_time if done else CLASSES_AT_A_TIME):
            # Filters with room: so many classes that all places together just suffice.
            most = -(-(done * num_classes + int(part[-1]) + 1) // num_filters)
            room = (most - owned.sum(dim=0).long()).clamp(min=0)
            once = room.clamp(max=1)
            places = torch.arange(num_filters, device="cpu").repeat_interleave(
                once if done and once.sum() >= len(part) else room
            )
            # 2: more than any choice of correlations can gain.
            meets = (owned[part] @ owned.T > 0).to(gains.dtype)
            meets[torch.arange(len(part), device="cpu"), part] = 0
            gain = (gains[part] - 2 * meets @ owned).masked_fill(owned[part] > 0, -1e6)
            rows, columns = _solve(gain[:, places])
            owned[part[rows], places[columns]] = 1
    return owned > 0


def _solve(gains: Tensor) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn; slow to import

    rows, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


class Assignment(NamedTuple):
    """What ``assign_filters`` found.

    Attributes:
        matrix: Whether a class owns a filter, bool [classes, filters].
        correlations: Of every filter's response with every class, float64 [classes, filters].
    """

    matrix: Tensor
    correlations: Tensor

    def __repr__(self) -> str:
        counts = self.matrix.sum(dim=1)
        unowned = int((~self.matrix.any(dim=0)).sum())
        return (
            f"Assignment({self.matrix.shape[1]} filters, {self.matrix.shape[0]} classes, {int(counts.min())} to "
            f"{int(counts.max())} filters a class, {unowned} unowned, mean correlation with the owner "
            f"{float(self.correlations[self.matrix].mean()):.2f})"
        )


@torch.no_grad()
def assign_filters(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    distributed: bool = False,
) -> Assignment:
    """Give each class the filters that already respond to it, before training: one pass in eval mode.

    The classifier, where it is masked, starts again from 0: negative weights, of a random start or of a dense
    classifier, would teach a class's filters to be silent for it. Under torch.distributed call it in every process with
    ``distributed=True``, each with a loader of its own share: sums are added up and all have the same assignment.

    Args:
        model: A model with the mechanism ``"assigned"``; its modes are left as found. Do this before making an EMA copy
            of it.
        loader: Training pictures, best without augmentation: yields (images, class indices, soft or multi-hot rows).
        amp_dtype: Autocast dtype; None: no autocast.
        progress: Called with the number of images after each batch.
        distributed: Add up the sums of all processes of the running process group.

    Returns:
        The assignment, with the correlations that it follows from.

    Raises:
        TypeError: If the model has no assigned filters.
        ValueError: If the loader yields nothing, a class has no pictures, or responses are not finite.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet"), 2, mechanism="assigned")
        >>> assign_filters(model, [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]).matrix.sum(dim=1)
        tensor([48, 48])
    """
    inner, mechanism = find_assigned(model)
    sums = no_sums(mechanism)
    for features, targets in features_of(inner, loader, amp_dtype=amp_dtype, progress=progress):
        sums = sums.plus(ResponseSums.of(mechanism.responses(features, inner.read_head()), targets, len(sums.target)))
    if distributed:
        sums = sums.of_all_processes()
    return use_sums(inner, mechanism, sums)


def use_sums(model: DifferentiatedModel, mechanism: AssignedFilters, sums: ResponseSums) -> Assignment:
    """Assign the filters of a model by sums that are known already.

    Raises:
        ValueError: If there are no pictures, a class has none, or responses are not finite.
    """
    if not sums.pictures:
        raise ValueError("the loader yields no images.")
    if not all(bool(part.isfinite().all()) for part in sums):
        bad = (~(sums.response + sums.response_squared).isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(
            f"the responses of {len(bad)} filters (the first: {bad[:1]}) are not finite, so the model's outputs cannot "
            "be either; check its weights, or leave out AMP."
        )
    empty = (sums.target == 0).nonzero()[:, 0].tolist()
    if empty:
        names = class_names(model) or range(len(sums.target))
        named = [str(names[index]) for index in empty]
        raise ValueError(
            f"every class needs pictures, but {len(empty)} of {len(sums.target)} have none ({', '.join(named[:5])}); "
            "give pictures of these, or differentiate with fewer classes."
        )
    correlations = correlation(sums)
    constant = int((sums.deviation() == 0).sum())
    if constant:
        _logger.info("%d filters respond to all pictures alike; they are handed out too", constant)
    matrix = assign(correlations, mechanism.config.filters_per_class)
    device = mechanism.assignment.device
    mechanism.assign_(matrix.to(device), sums.mean().to(device), sums.deviation().square().to(device))
    mechanism.restart_classifier_(model.read_head())
    return Assignment(matrix, correlations.cpu())


def no_sums(mechanism: AssignedFilters) -> ResponseSums:
    """Sums over no pictures, on the device of the mechanism (float32 where that knows no float64)."""
    device = mechanism.assignment.device
    exact = torch.float64 if device.type != "mps" else torch.float32
    classes, filters = (torch.zeros(size, dtype=exact, device=device) for size in mechanism.assignment.shape)
    return ResponseSums(filters.new_zeros(()), filters, filters, classes, classes, classes[:, None] * filters)


@torch.no_grad()
def features_of(
    model: DifferentiatedModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The stage's features of each batch in eval mode, as the head sees them, and the targets, on the model's device.

    Code in the loop's body runs under the same autocast, but with gradients, unless the caller switches them off.
    """
    device = next(model.parameters()).device
    with measured(model):
        for images, targets in checked_batches(model, loader, progress, soft=True):
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                yield seen_features(model, images), targets


def find_assigned(model: Any) -> tuple[DifferentiatedModel, AssignedFilters]:
    """The differentiated model behind wrappers, and its assigned filters.

    Raises:
        TypeError: If there are none.
    """
    inner = unwrap_model(model)
    if not isinstance(inner, DifferentiatedModel):
        raise TypeError(
            f"expected a differentiated model, but found {type(inner).__name__}; call "
            "differentiate(model, num_classes, mechanism='assigned') first."
        )
    found = _assigned_in(inner)
    if found is None:
        raise TypeError(
            f"expected a model with assigned filters, but its mechanism is {inner.mechanism.name!r}; "
            "differentiate(model, num_classes, mechanism='assigned') has them."
        )
    return inner, found


def has_assigned(model: nn.Module) -> bool:
    """Whether ``assign_filters`` applies to this model, also wrapped or compiled."""
    inner = unwrap_model(model)
    return isinstance(inner, DifferentiatedModel) and _assigned_in(inner) is not None


def _assigned_in(model: DifferentiatedModel) -> AssignedFilters | None:
    """The mechanism itself, or the member of a chain."""
    return next((module for module in model.mechanism.modules() if isinstance(module, AssignedFilters)), None)
