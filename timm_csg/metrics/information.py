"""Mutual information between filters and classes, the measure of class specificity of Liang et al., ECCV 2020.

`mutual_information` returns the numbers of scikit-learn's `mutual_info_classif(features, targets == c)` for all classes
c at once; `_one_vs_rest.py` holds the counting that makes this fast.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_csg.checks import whole
from timm_csg.metrics._checks import check_features, check_rows, class_counts
from timm_csg.metrics._one_vs_rest import digamma_sums, plan_labels
from timm_csg.metrics.display import in_one_line

_VALUES_PER_CHUNK = {"cpu": 2**15 - 1, "cuda": 2**22}  # CPU: fits the caches, and below it torch starts no threads,
# whose waiting for each other costs more than they bring (25 times the time where other programs use the cores)
_MOST_VALUES = 2**29  # positions are 32-bit numbers
_VALUES_IN_FLOAT64 = 2**27  # prepared at once: 1 GiB


def mutual_information(
    features: Tensor,
    targets: Tensor,
    num_classes: int | None = None,
    *,
    neighbors: int = 3,
    random_state: int = 0,
    chunk_size: int | None = None,
    threads: int = 1,
) -> Tensor:
    """Mutual information between every filter's response and membership of every class (class against rest).

    The same numbers as `sklearn.feature_selection.mutual_info_classif(features, targets == c, random_state=0)` for each
    class c (to 1e-12, ties and tiny classes included), the estimator behind the MIS of Liang et al., ECCV 2020
    (https://arxiv.org/abs/2007.08194). The work grows with samples x filters and not with the number of classes.
    The estimate is never negative; for a filter that knows the class it can pass `mutual_information_bound` by about
    1 / (2 x samples).

    Memory beside the features, which may be memory-mapped (`Activations.open`): a float64 copy on the CPU of as many
    filters as fit into 1 GiB (at least one), and in each thread, per value of a chunk of filters (samples x
    chunk_size), about 0.4 kB. Chunks are independent: `threads` > 1 works on as many at once; scaling and noise stay on
    one. On a GPU chunks follow each other, and only scaling and noise run on the CPU.

    Args:
        features: Pooled responses [samples, filters], floating point, finite, at least 3 samples.
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out. A class without samples gets 0.
        neighbors: Neighbours k of the estimator; larger is smoother and more biased.
        random_state: Seed of the noise (1e-10 of the scale) which scikit-learn adds to separate equal responses.
        chunk_size: Filters worked on at once; chosen by the device if left out. It changes memory and speed only.
        threads: CPU threads; for features on the CPU. It changes memory and speed only.

    Returns:
        Mutual information [classes, filters] in nats, float64, on the device of the features.

    Raises:
        TypeError, ValueError: If features and targets do not fit each other, are not finite, or an option is out of
            its range.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.3], [5.0], [5.1], [5.2], [5.3]])
        >>> mutual_information(features, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        tensor([[0.7595],
                [0.7595]], dtype=torch.float64)
    """
    check_features(features, samples=3)
    if (whole(neighbors) or 0) < 1:
        raise ValueError(f"neighbors must be an integer of at least 1, but got {neighbors!r}; scikit-learn uses 3.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 filter, but got {chunk_size}; leave it out for the default.")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, but is {threads}.")
    counts = class_counts(targets, num_classes)
    check_rows(features, targets)
    plan = plan_labels(targets.long().to(features.device), counts.to(features.device), neighbors)
    if chunk_size is None:
        chunk_size = _VALUES_PER_CHUNK.get(features.device.type, 2**22) // max(len(features), len(counts))
    chunk_size = max(1, min(chunk_size, _MOST_VALUES // (len(features) + len(counts) + 2 * neighbors)))
    sums: list[Tensor] = []
    block_size = max(1, _VALUES_IN_FLOAT64 // len(features))
    with ThreadPoolExecutor(threads) as pool:  # which starts a thread only when it is given work
        run = pool.map if threads > 1 and features.device.type == "cpu" else map
        for start in range(0, features.shape[1], block_size):
            responses = _scaled_with_noise(features, random_state, slice(start, start + block_size))
            chunks = (chunk.to(features.device) for chunk in responses.split(chunk_size))
            sums.extend(run(partial(digamma_sums, plan=plan), chunks))
    return (plan.constant[:, None] - torch.cat(sums).T / plan.used[:, None]).clamp_min(0)


def mutual_information_score(mi: Tensor) -> Tensor:
    """Mutual information score (MIS): the mean over filters of the largest mutual information with any class.

    Liang et al., ECCV 2020, section 4.1 (https://arxiv.org/abs/2007.08194). At most the largest value of
    `mutual_information_bound`, reached when every filter tells one of the largest classes from the rest.

    Args:
        mi: Mutual information [classes, filters] in nats.

    Returns:
        Scalar in nats.

    Raises:
        ValueError: If ``mi`` is not a matrix with at least one entry.

    Example:
        >>> mutual_information_score(torch.tensor([[0.3, 0.0, 0.1], [0.1, 0.2, 0.1]]))
        tensor(0.2000)
    """
    _check_matrix(mi)
    return mi.amax(dim=0).mean()


def mutual_information_bound(targets: Tensor, num_classes: int | None = None) -> Tensor:
    """Largest mutual information a filter can have with each class: the entropy of "this class or not".

    With p the share of the class this is h(p) = -p ln p - (1 - p) ln(1 - p). A filter scores with one class only, so
    the *largest* entry, not the mean, bounds `mutual_information_score`: h(1 / classes) when all classes are equally
    frequent (0.3251 for ten classes), and the entropy of the class nearest to one half otherwise.

    Args:
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out.

    Returns:
        Bounds [classes] in nats, float64.

    Example:
        >>> mutual_information_bound(torch.tensor([0, 0, 1, 2]))
        tensor([0.6931, 0.5623, 0.5623], dtype=torch.float64)
    """
    counts = class_counts(targets, num_classes)
    share = counts.double() / counts.sum()
    return -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)


@in_one_line
class ClassInformation(NamedTuple):
    """What filters tell about each class, see ``mutual_information_per_class``.

    Attributes:
        best: Largest mutual information of any filter with the class, nats [classes].
        best_filter: That filter, int64 [classes].
        filters: Number of filters that tell more about this class than about any other, int64 [classes].
        mean_of_own: Mean over those filters of their information with the class, nats; 0 without any [classes].
    """

    best: Tensor
    best_filter: Tensor
    filters: Tensor
    mean_of_own: Tensor


def mutual_information_per_class(mi: Tensor) -> ClassInformation:
    """Table with a row per class: its best filter, and the filters that reveal most about it.

    MIS is the mean of ``mean_of_own`` weighted by ``filters``. Compare ``best`` with ``mutual_information_bound``.

    Args:
        mi: Mutual information [classes, filters] in nats.

    Returns:
        The columns.

    Raises:
        ValueError: If ``mi`` is not a matrix with at least one entry.

    Example:
        >>> mutual_information_per_class(torch.tensor([[0.3, 0.0, 0.1], [0.1, 0.2, 0.0]])).mean_of_own
        tensor([0.2000, 0.2000])
    """
    _check_matrix(mi)
    own, owner = mi.max(dim=0)
    filters = torch.bincount(owner, minlength=len(mi))
    sums = torch.zeros(len(mi), dtype=mi.dtype, device=mi.device).index_add_(0, owner, own)
    return ClassInformation(*mi.max(dim=1), filters, sums / filters.clamp_min(1))


@in_one_line
class FilterInformation(NamedTuple):
    """What each filter tells, see ``mutual_information_per_filter``.

    Attributes:
        best: Largest mutual information with any class, nats [filters]; MIS is its mean.
        best_class: That class, int64 [filters].
        second: Largest mutual information with another class, nats [filters]; 0 if there is none.
        second_class: That class, int64 [filters]; ``best_class`` if there is none.
        selectivity: (best - second) / best, in [0, 1]: 1 if the filter tells about one class only; 0 where best is 0.
    """

    best: Tensor
    best_class: Tensor
    second: Tensor
    second_class: Tensor
    selectivity: Tensor


def mutual_information_per_filter(mi: Tensor) -> FilterInformation:
    """Table with a row per filter: the class it reveals most about, the next one, and how clear the first place is.

    A filter that fires for one class of ten also tells a little about the nine others (they are the rest), so the
    selectivity of a perfect filter is below 1: 0.966 for ten equally frequent classes, and always 0 for two classes.

    Args:
        mi: Mutual information [classes, filters] in nats.

    Returns:
        The columns.

    Raises:
        ValueError: If ``mi`` is not a matrix with at least one entry.

    Example:
        >>> mutual_information_per_filter(torch.tensor([[0.4, 0.0], [0.1, 0.2]])).selectivity
        tensor([0.7500, 1.0000])
    """
    _check_matrix(mi)
    values, classes = mi.topk(min(2, len(mi)), dim=0)
    second = values[1] if len(mi) > 1 else torch.zeros_like(values[0])
    selectivity = (values[0] - second) / values[0].where(values[0] > 0, 1)
    return FilterInformation(values[0], classes[0], second, classes[-1], selectivity)


def _check_matrix(mi: Tensor) -> None:
    if mi.ndim != 2 or mi.numel() == 0:
        raise ValueError(
            f"mi must be a matrix [classes, filters] with at least one entry, but its shape is {list(mi.shape)}; "
            "pass the result of mutual_information()."
        )


def _scaled_with_noise(features: Tensor, random_state: int, filters: slice = slice(None)) -> Tensor:
    """scikit-learn's preparation of some filters, bit for bit, as [filters, samples] float64 on the CPU.

    NumPy and not torch, because the order of its sums and its generator decide the last bits, and these decide ties.
    """
    columns = features.detach()[:, filters]
    rows = columns.cpu().T.to(torch.float64, memory_format=torch.contiguous_format, copy=True).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.concatenate([row.std(axis=1) for row in np.array_split(rows, max(1, rows.size >> 20))])
    if not np.isfinite(scale).all():
        raise ValueError(
            f"the variance of features overflows float64 (largest value {np.abs(rows).max():.1e}); "
            "divide features by their largest value."
        )
    scale[scale < 10 * np.finfo(scale.dtype).eps] = 1.0
    rows /= scale[:, None]
    amplitude = 1e-10 * np.maximum(1, [np.abs(row).mean() for row in rows])
    generator = np.random.RandomState(random_state)
    for start in range(0, rows.shape[1], 1024):  # blocks of samples draw the same sequence as the whole matrix
        block = rows[:, start : start + 1024]
        block += (amplitude * generator.standard_normal((block.shape[1], features.shape[1]))[:, filters]).T
    return torch.from_numpy(rows)
