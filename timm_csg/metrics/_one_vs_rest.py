"""Nearest-neighbour counts of all "class against rest" labellings of the same samples, for mutual_information.py.

The estimator of Ross (PLoS ONE 2014, https://doi.org/10.1371/journal.pone.0087357) takes one filter and one labelling
(label: in the class, or in the rest). For every sample it finds the distance to the k-th nearest sample with the same
label, then counts the samples of any label that are strictly nearer. One sort per filter answers this for all classes:

* within the class, the k nearest are among the k class members on either side in sorted order;
* within the rest, they are the k nearest of *all* samples, unless one of those belongs to the class. So a sample needs
  a search of its own for at most k classes, however many there are; all other classes share one answer;
* the samples strictly nearer form an interval in sorted order, found by bisection between these neighbours.

Vocabulary. Line: the sorted responses of a filter with k sentinels (minus and plus infinity) at its ends; the lines of
all filters follow each other in one flat tensor. Position: index into it. Column: index of a sample after ordering the
samples by class, so that every class is one block of columns, the same block for all filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_INDEX = torch.int32  # of classes, columns and positions: twice as fast as int64
_FAR = 2**30  # an offset beyond every position


@dataclass(frozen=True)
class LabelPlan:
    """What all filters share."""

    neighbors: int
    targets: Tensor  # [samples]
    large_columns: Tensor  # [columns]: those of the classes that are not small
    large_classes: Tensor  # [columns]: their classes
    previous: Tensor  # [neighbors, columns]: column of the 1st, 2nd, ... member before; `samples` where there is none
    following: Tensor  # [neighbors, columns]: the same after; `samples + 1` where there is none
    small: list[tuple[Tensor, Tensor]]  # classes [groups] and columns [groups, size] of small classes and small rests
    rest_is_large: Tensor  # [classes]
    loners: Tensor  # [classes]: column of the only member of the class or of its rest, which nobody counts; or -1
    constant: Tensor  # [classes]: the estimate without its last term
    used: Tensor  # [classes]: samples that take part
    digamma: Tensor  # [samples + 1]


def plan_labels(targets: Tensor, counts: Tensor, neighbors: int) -> LabelPlan:
    """Everything that depends on the labels alone; targets [samples], counts [classes]."""
    samples, device = len(targets), targets.device
    column_classes, column = targets.sort().values, torch.arange(samples, dtype=_INDEX, device=device)
    stops = counts.cumsum(0, dtype=_INDEX)
    start, stop = (stops - counts.to(_INDEX))[column_classes], stops[column_classes]
    steps = torch.arange(1, neighbors + 1, dtype=_INDEX, device=device)[:, None]
    previous = torch.where(column - steps >= start, column - steps, samples)
    following = torch.where(column + steps < stop, column + steps, samples + 1)

    small_size = 2 * neighbors + 1
    large_columns = (counts[column_classes] > small_size).nonzero().flatten()
    sides = torch.stack([counts, samples - counts])
    sides = torch.where(sides > 1, sides, 0)  # scikit-learn drops a sample that is alone with its label
    used = sides.sum(dim=0)
    digamma = torch.special.digamma(torch.arange(samples + 1, dtype=torch.float64, device=device))
    per_sample = digamma[(sides - 1).clamp(1, neighbors)] - digamma[sides.clamp_min(1)]
    return LabelPlan(
        neighbors=neighbors,
        targets=targets.to(_INDEX),
        large_columns=large_columns,
        large_classes=column_classes[large_columns].to(_INDEX),
        previous=previous[:, large_columns],
        following=following[:, large_columns],
        small=_small_groups(column_classes, counts, small_size),
        rest_is_large=samples - counts > small_size,
        loners=_loners(column_classes, counts),
        constant=digamma[used] + (sides * per_sample).sum(dim=0) / used,
        used=used,
        digamma=digamma,
    )


def _small_groups(column_classes: Tensor, counts: Tensor, small_size: int) -> list[tuple[Tensor, Tensor]]:
    """Classes and rests of 2 to small_size samples, where scikit-learn searches by brute force, with other rounding."""
    samples, groups = len(column_classes), []
    for size in range(2, min(small_size, samples) + 1):
        for side_counts, in_class in ((counts, True), (samples - counts, False)):
            classes = (side_counts == size).nonzero().flatten()
            if len(classes):
                if in_class:
                    columns = (counts.cumsum(0) - counts)[classes, None] + torch.arange(size, device=counts.device)
                else:
                    columns = (column_classes != classes[:, None]).nonzero()[:, 1].view(len(classes), size)
                groups.append((classes, columns))
    return groups


def _loners(column_classes: Tensor, counts: Tensor) -> Tensor:
    samples = len(column_classes)
    loners = torch.where(counts == 1, counts.cumsum(0) - 1, -1)
    other_column = torch.where(column_classes[0] == counts.argmax(), samples - 1, 0)
    return torch.where(counts == samples - 1, other_column, loners)


@dataclass(frozen=True)
class _Lines:
    """The sorted responses of a chunk of filters, flat."""

    values: Tensor
    classes: Tensor  # class at each position, -1 for sentinels
    positions: Tensor  # [filters, samples + 2]: position of each column, then those of a sentinel before and after
    before: Tensor  # last position before this one with another class
    after: Tensor  # first position after this one with another class


def digamma_sums(responses: Tensor, plan: LabelPlan) -> Tensor:
    """The sum over samples of digamma(count) in both labels, [filters, classes]; responses [filters, samples]."""
    lines = _lines(responses, plan)
    sums = responses.new_zeros(len(responses), len(plan.loners))
    if len(plan.large_columns):
        _add_large_classes(sums, lines, plan)
    if plan.rest_is_large.any():
        _add_large_rests(sums, lines, plan)
    for classes, columns in plan.small:
        _add_small_groups(sums, lines, plan, classes, columns)
    return sums


def _lines(responses: Tensor, plan: LabelPlan) -> _Lines:
    filters, samples = responses.shape
    pad, device = plan.neighbors, responses.device
    order = _argsort(responses)
    classes = torch.full((filters, samples + 2 * pad), -1, dtype=_INDEX, device=device)
    classes[:, pad : pad + samples] = _pick(plan.targets, order)
    values = torch.full(classes.shape, torch.inf, dtype=responses.dtype, device=device)
    values[:, :pad] = -torch.inf
    values[:, pad : pad + samples] = responses.gather(1, order)

    first = torch.arange(filters, dtype=_INDEX, device=device)[:, None] * (samples + 2 * pad) + pad
    class_then_value = classes[:, pad : pad + samples].long() * samples + torch.arange(samples, device=device)
    column_order = _argsort(class_then_value).to(_INDEX)
    positions = torch.cat([first + column_order, first - 1, first + samples], dim=1)

    flat = classes.flatten()
    changed = torch.ones_like(flat, dtype=torch.bool)
    changed[1:] = flat[1:] != flat[:-1]
    run, starts = changed.cumsum(0, dtype=_INDEX), _true_at(changed).to(_INDEX)
    starts = torch.cat([starts, starts.new_tensor([len(flat)])])
    return _Lines(values.flatten(), flat, positions, before=_pick(starts, run - 1) - 1, after=_pick(starts, run))


def _add_large_classes(sums: Tensor, lines: _Lines, plan: LabelPlan) -> None:
    """Own label of the members of all classes with more than 2 k samples."""
    centre = lines.positions.index_select(1, plan.large_columns).flatten()
    left = [lines.positions.index_select(1, columns).flatten() for columns in plan.previous]
    right = [lines.positions.index_select(1, columns).flatten() for columns in plan.following]
    cells = _cells(sums, plan.large_classes.expand(len(sums), -1))
    counts, _ = _count_nearer(lines, centre, left, right, _loner_positions(lines, plan, cells))
    sums.view(-1).index_add_(0, cells, _pick(plan.digamma, counts))


def _add_large_rests(sums: Tensor, lines: _Lines, plan: LabelPlan) -> None:
    """The rest's samples, for all classes that leave more than 2 k: the shared answer, then its corrections."""
    filters, samples = len(lines.positions), len(plan.targets)
    steps = range(1, plan.neighbors + 1)
    centre = (lines.positions[:, samples, None] + 1 + torch.arange(samples, dtype=_INDEX, device=sums.device)).flatten()
    left, right = [centre - step for step in steps], [centre + step for step in steps]
    counts, taken_left = _count_nearer(lines, centre, left, right)
    shared = _pick(plan.digamma, counts)
    own_class, base = _pick(lines.classes, centre), torch.zeros_like(sums)
    cells = _cells(sums, own_class.view(filters, samples))
    base.view(-1).index_add_(0, cells, -shared)
    base -= base.sum(dim=1, keepdim=True)

    near = [_pick(lines.classes, centre - taken_left + slot) for slot in range(plan.neighbors + 1)]
    for slot, neighbor_class in enumerate(near):
        affected = neighbor_class != own_class
        for earlier in near[:slot]:
            affected &= neighbor_class != earlier
        query = _true_at(affected)
        left_out = _pick(neighbor_class, query)
        cells_of = _pick(cells - own_class, query) + left_out
        middle = _pick(centre, query)
        left = _walk(lines.classes, lines.before, middle, left_out, -1, plan.neighbors)
        right = _walk(lines.classes, lines.after, middle, left_out, 1, plan.neighbors)
        counts, _ = _count_nearer(lines, middle, left, right, _loner_positions(lines, plan, cells_of))
        base.view(-1).index_add_(0, cells_of, _pick(plan.digamma, counts) - _pick(shared, query))
    sums += base.where(plan.rest_is_large, 0)


def _add_small_groups(sums: Tensor, lines: _Lines, plan: LabelPlan, classes: Tensor, columns: Tensor) -> None:
    """Groups of equal size up to 2 k + 1: all pairwise distances, with the rounding of scikit-learn's brute force."""
    centre = lines.positions.index_select(1, columns.flatten()).view(-1, *columns.shape)  # [filters, groups, size]
    member = _pick(lines.values, centre)
    square, product = member * member, member[..., :, None] * member[..., None, :]
    squared = ((square[..., :, None] - 2 * product) + square[..., None, :]).clamp_min(0)
    distance = _exact_sqrt(squared.sort(dim=-1).values[..., min(plan.neighbors, columns.shape[1] - 1)])
    cells = _cells(sums, classes[:, None].expand_as(columns).reshape(1, -1).expand(len(sums), -1))
    low = (lines.positions[:, -2, None, None] + 1).expand(centre.shape).flatten()
    high = low + len(plan.targets) - 1
    radius, loners = _just_below(distance.flatten()), _loner_positions(lines, plan, cells)
    counts = _count_between(lines.values, centre.flatten(), radius, low, high, loners)
    sums.view(-1).index_add_(0, cells, _pick(plan.digamma, counts))


def _walk(classes: Tensor, jump: Tensor, centre: Tensor, left_out: Tensor, step: int, neighbors: int) -> list[Tensor]:
    """The 1st to k-th position beside each centre whose class is not left_out; jump leads past a run of equal ones."""
    walked, position = [], centre
    farther = torch.minimum if step < 0 else torch.maximum
    for _ in range(neighbors):
        position = position + step
        allowed = _pick(classes, position) != left_out
        position = farther(position, _pick(jump, position).add(allowed, alpha=-step * _FAR))
        walked.append(position)
    return walked


def _count_nearer(
    lines: _Lines, centre: Tensor, left: list[Tensor], right: list[Tensor], loners: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Number of samples strictly nearer than the k-th of the given neighbours; how many of the k lie on the left.

    The 1st to k-th neighbour on either side are given by position; a sentinel stands for a missing one.
    """
    value, neighbors = _pick(lines.values, centre), len(left)
    left_distance = [value - _pick(lines.values, position) for position in left]
    right_distance = [_pick(lines.values, position) - value for position in right]
    distance, taken_left = torch.zeros_like(value), torch.zeros_like(centre)
    for near, far in zip(left_distance, reversed(right_distance), strict=True):  # merges two ascending lists
        distance = torch.maximum(distance, torch.minimum(near, far))
        taken_left += near <= far
    radius = _just_below(distance)
    low, high = left[-1] + 1, right[-1] - 1
    if (distance == 0).any():  # more than k equal values: the interval may reach beyond the neighbours
        samples = lines.positions.shape[1] - 2
        line_start = centre - centre % (samples + 2 * neighbors) + neighbors
        low = torch.where(distance == 0, line_start, low)
        high = torch.where(distance == 0, line_start + samples - 1, high)
    return _count_between(lines.values, centre, radius, low, high, loners), taken_left


def _count_between(
    values: Tensor, centre: Tensor, radius: Tensor, low: Tensor, high: Tensor, loners: Tensor | None
) -> Tensor:
    """Number of positions from low to high whose difference to the centre is at most the radius; loners don't count.

    Bisection on the difference itself and not on `value + radius`, whose rounding would gain or lose samples. Written
    with minimum, maximum and offsets because torch.where takes several times as long on the CPU.
    """
    value, first, last = _pick(values, centre), centre, centre
    for step in _steps(centre - low):
        tried = torch.maximum(first - step, low)
        first = torch.minimum(first, tried.add(value - _pick(values, tried) > radius, alpha=_FAR))
    for step in _steps(high - centre):
        tried = torch.minimum(last + step, high)
        last = torch.maximum(last, tried.add(_pick(values, tried) - value > radius, alpha=-_FAR))
    counts = last - first + 1
    return counts if loners is None else counts - ((first <= loners) & (loners <= last)).to(counts.dtype)


def _steps(spans: Tensor) -> list[int]:
    """Halving steps that reach every offset up to the largest span."""
    return [1 << bit for bit in reversed(range(int(spans.max()).bit_length()))] if len(spans) else []


def _loner_positions(lines: _Lines, plan: LabelPlan, cells: Tensor) -> Tensor | None:
    if not (plan.loners >= 0).any():
        return None
    return _pick(
        torch.where(plan.loners >= 0, lines.positions.index_select(1, plan.loners.clamp_min(0)), -1).flatten(), cells
    )


def _cells(sums: Tensor, classes: Tensor) -> Tensor:
    """Flat index into sums [filters, classes] of each entry of classes [filters, any]."""
    rows = torch.arange(len(sums), dtype=_INDEX, device=sums.device)[:, None] * sums.shape[1]
    return (rows + classes).flatten()


def _just_below(distance: Tensor) -> Tensor:
    return distance.nextafter(torch.zeros_like(distance))


def _exact_sqrt(square: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt on the CPU is not (torch 2.15 with MKL: 1 % of results are one bit off)."""
    return torch.from_numpy(np.sqrt(square.cpu().numpy())).to(square.device)


def _pick(flat: Tensor, index: Tensor) -> Tensor:
    """flat[index] for an index of any shape; several times as fast on the CPU."""
    return flat.index_select(0, index.reshape(-1)).view(index.shape)


def _true_at(mask: Tensor) -> Tensor:
    """mask.nonzero().flatten(); on the CPU by NumPy, because torch would start threads for it."""
    on_cpu = mask.device.type == "cpu"
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if on_cpu else mask.nonzero().flatten()


def _argsort(values: Tensor) -> Tensor:
    """Argsort along the last axis, in any order of equal values; NumPy's is several times as fast on the CPU."""
    on_cpu = values.device.type == "cpu"
    return torch.from_numpy(np.argsort(values.numpy(), axis=-1)) if on_cpu else values.argsort(dim=-1)
