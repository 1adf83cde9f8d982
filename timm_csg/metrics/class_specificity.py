"""Which classes a filter responds to, by plain statistics of its responses: purity, selectivity index, correlation.

Unlike the mutual information these cost one pass over the responses, keep the sign of what a filter tells (the
correlation) or look at its strongest pictures only (the purity).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from timm_csg.metrics._checks import check_features, check_rows, class_counts

_VALUES_PER_CHUNK = 2**23  # samples (or classes, if more) x filters worked on at once; in float64 64 MiB


def purity(features: Tensor, targets: Tensor, num_classes: int | None = None, *, count: int = 20) -> Tensor:
    """Share of the most frequent class among the pictures to which each filter responds most strongly.

    purity_k = max over classes c of |{i among the ``count`` pictures with the largest response of filter k: y_i = c}| /
    count, as clusters are scored by their most frequent class (Manning et al., Introduction to Information Retrieval,
    2008, section 16.3). The number to report is the mean over filters.

    Pictures with *equal* responses at the last place (zeros behind a ReLU) share the places that are left: each class
    gets its share of them, so that the order of the data set, often sorted by class, decides nothing. A constant filter
    so has the share of the most frequent class. A class of fewer pictures than ``count`` cannot fill the places.

    Args:
        features: Pooled responses [samples, filters], floating point, finite.
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out. It does not change the result.
        count: Number n of strongest pictures, at most that of all samples.

    Returns:
        Purity [filters], float64, from 1 / classes to 1, no unit.

    Raises:
        TypeError, ValueError: If features or targets are not as stated, or there are fewer samples than ``count``.

    Example:
        >>> features = torch.tensor([[9.0, 0.0], [8.0, 0.0], [7.0, 0.0], [0.0, 0.0]])
        >>> purity(features, torch.tensor([1, 1, 0, 0]), count=3)
        tensor([0.6667, 0.5000], dtype=torch.float64)
    """
    check_features(features)
    counts = class_counts(targets, num_classes)
    check_rows(features, targets)
    if isinstance(count, bool) or not 1 <= count <= len(features):
        raise ValueError(
            f"count must be between 1 and the number of samples, {len(features)}, but is {count}; "
            "pass a smaller count or more images."
        )
    shares = []
    for chunk in filter_chunks(features, len(counts)):
        last = chunk.topk(count, dim=0).values[-1]
        stronger, equal = (chunk > last).double(), (chunk == last).double()
        left = (count - stronger.sum(dim=0)) / equal.sum(dim=0)
        shares.append(class_sums(stronger + left * equal, targets, len(counts)).amax(dim=0) / count)
    return torch.cat(shares)


def owner_purity(features: Tensor, targets: Tensor, owners: Tensor, *, count: int = 9) -> float:
    """Share of the owner's class among the pictures to which a filter responds most, over all owned filters.

    Filters with the same response to every picture are left out. Of equal responses the first pictures count.

    Args:
        features: Pooled responses [samples, filters].
        targets: Class indices [samples].
        owners: Class of each filter, int [filters]; -1 for one that no class owns.
        count: Number of strongest pictures; all where there are fewer.

    Returns:
        A share in [0, 1], no unit; 0 without such filters.

    Example:
        >>> features = torch.tensor([[9.0, 1.0], [8.0, 1.0], [0.0, 1.0]])
        >>> owner_purity(features, torch.tensor([0, 1, 1]), torch.tensor([0, 1]), count=2)
        0.5
    """
    check_features(features)
    check_rows(features, targets)
    judged = (owners >= 0) & (features.amax(dim=0) > features.amin(dim=0))
    strongest = features[:, judged].argsort(dim=0, descending=True, stable=True)[:count]
    hits = targets[strongest] == owners[judged]
    return float(hits.double().mean()) if hits.numel() else 0.0


def class_selectivity(features: Tensor, targets: Tensor, num_classes: int | None = None) -> Tensor:
    """Class selectivity index: how far a filter's mean response to its best class lies above that to the others.

    (μ_max - μ_rest) / (μ_max + μ_rest) of Morcos et al., ICLR 2018 (https://arxiv.org/abs/1803.06959): μ_max is the
    largest mean response to one class, μ_rest the mean of the means of the other classes. 0 if a filter responds to all
    classes alike, 1 if to one only. Classes without samples are left out; a filter that never responds has 0, and so
    has every filter where only one class has samples.

    The index is defined for responses behind a ReLU. For signed ones it leaves [0, 1], and a constant that is added
    changes it, so negative responses are refused rather than shifted: clamp them, which asks for the positive half
    alone, or use ``class_correlation``.

    Args:
        features: Pooled responses [samples, filters], floating point, finite, none negative.
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out. It does not change the result.

    Returns:
        Index [filters], float64 in [0, 1], no unit.

    Raises:
        TypeError, ValueError: If features or targets are not as stated, or a response is negative.

    Example:
        >>> class_selectivity(torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 2]))
        tensor([0.7143, 0.0000], dtype=torch.float64)
    """
    check_features(features)
    counts = class_counts(targets, num_classes).to(features.device)
    check_rows(features, targets)
    smallest = float(features.detach().min())
    if smallest < 0:
        raise ValueError(
            f"the class selectivity index needs responses of at least 0, but the smallest is {smallest:.3g}; pass "
            "features.clamp_min(0), or use class_correlation, which takes signed responses."
        )
    present = counts > 0
    indices = []
    for chunk in filter_chunks(features, len(counts)):
        scaled = chunk.double() / chunk.amax(dim=0).double().clamp_min(torch.finfo(torch.float64).tiny)
        means = class_sums(scaled, targets, len(counts))[present] / counts[present, None]
        best = means.amax(dim=0)
        rest = (means.sum(dim=0) - best) / max(1, len(means) - 1)
        known = (best > 0) & (len(means) > 1)
        index = (best - rest) / (best + rest).where(known, 1)
        indices.append(index.where(known, 0).clamp(0, 1))  # equal means may differ by their rounding
    return torch.cat(indices)


def class_correlation(features: Tensor, targets: Tensor, num_classes: int | None = None) -> Tensor:
    """Correlation of every filter's response with "the picture is of class c", for every class: signed.

    r[c, k] = (mean of filter k over class c - mean over all) / (deviation of filter k) x sqrt(p / (1 - p)), p the share
    of the class: the point-biserial correlation, the same as Pearson's with an indicator of 0 and 1. What QPM assigns
    filters by (Norrenbrock et al., ICLR 2025). Negative where a filter is *silent* for the class, which mutual
    information rewards as much as a response. With two classes the two rows are each other's negative.

    Args:
        features: Pooled responses [samples, filters], floating point, finite.
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out.

    Returns:
        Correlation [classes, filters], float64 in [-1, 1], no unit; 0 for constant filters, for classes without
        samples, and where all samples are of one class. ``owners`` of it gives the class each filter is strongest for.

    Raises:
        TypeError, ValueError: If features or targets are not as stated.

    Example:
        >>> class_correlation(torch.tensor([[2.0, 5.0], [1.0, 5.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
        tensor([[ 0.8660,  0.0000],
                [-0.8660,  0.0000]], dtype=torch.float64)
    """
    check_features(features)
    counts = class_counts(targets, num_classes).to(features.device)
    check_rows(features, targets)
    scale = indicator_norm(counts)
    rows = [class_sums(chunk, targets, len(counts)) * scale for chunk in standardised_chunks(features, len(counts))]
    return torch.cat(rows, dim=1).clamp(-1, 1)


def standardised_chunks(features: Tensor, num_classes: int) -> Iterator[Tensor]:
    """Some filters at a time [samples, filters of the chunk], float64, each of mean 0 and norm 1; constant ones 0."""
    for chunk in filter_chunks(features, num_classes):
        varies = chunk.amax(dim=0) > chunk.amin(dim=0)
        centred = chunk.double()
        centred = centred / centred.abs().amax(dim=0).clamp_min(torch.finfo(torch.float64).tiny)  # squares stay finite
        centred = (centred - centred.mean(dim=0)).where(varies, 0)
        norm = centred.norm(dim=0)
        yield centred / norm.where(norm > 0, 1)


def indicator_norm(counts: Tensor) -> Tensor:
    """1 / norm of each class's centred indicator, [classes, 1] float64; 0 for a class with none or all of the samples.

    Times the sum over the class of a filter of mean 0 and norm 1 this is their correlation.
    """
    total = counts.sum()
    squared = counts.double() * (total - counts) / total
    return torch.where(squared > 0, squared, torch.inf).rsqrt()[:, None]


def filter_chunks(features: Tensor, num_classes: int) -> Iterator[Tensor]:
    """Some filters at a time [samples, filters of the chunk], so that copies in float64 stay small."""
    size = max(1, _VALUES_PER_CHUNK // max(len(features), num_classes))
    return iter(features.detach().split(size, dim=1))


def class_sums(values: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Sum over the samples of each class [classes, filters]."""
    sums = values.new_zeros(num_classes, values.shape[1])
    return sums.index_add_(0, targets.long().to(values.device), values)
