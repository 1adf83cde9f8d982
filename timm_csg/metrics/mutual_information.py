"""Mutual information between filters and classes, the measure of class specificity of Liang et al., ECCV 2020.

`mutual_information` returns the numbers of scikit-learn's `mutual_info_classif(features, targets == c)` for all classes
c at once; `_one_vs_rest.py` holds the counting that makes this fast.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from timm_csg.metrics._one_vs_rest import digamma_sums, plan_labels

_VALUES_PER_CHUNK = {"cpu": 2**15 - 1, "cuda": 2**22}  # CPU: fits the caches, and below it torch starts no threads,
# whose waiting for each other costs more than they bring (25 times the time where other programs use the cores)
_MOST_VALUES = 2**29  # positions are 32-bit numbers


def mutual_information(
    features: Tensor,
    targets: Tensor,
    num_classes: int | None = None,
    *,
    neighbors: int = 3,
    random_state: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """Mutual information between every filter's response and membership of every class (class against rest).

    The same numbers as `sklearn.feature_selection.mutual_info_classif(features, targets == c, random_state=0)` for each
    class c (to 1e-12, ties and tiny classes included), the estimator behind the MIS of Liang et al., ECCV 2020
    (https://arxiv.org/abs/2007.08194). The work grows with samples x filters and not with the number of classes.
    The estimate is never negative; for a filter that knows the class it can pass `mutual_information_bound` by about
    1 / (2 x samples).

    Memory beside the features: one float64 copy of them on the CPU, and per value of a chunk of filters (samples x
    chunk_size) about 0.4 kB.

    Args:
        features: Pooled responses [samples, filters], floating point, finite, at least 3 samples.
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out. A class without samples gets 0.
        neighbors: Neighbours k of the estimator; larger is smoother and more biased.
        random_state: Seed of the noise (1e-10 of the scale) which scikit-learn adds to separate equal responses.
        chunk_size: Filters worked on at once; chosen by the device if left out. It changes memory and speed only.

    Returns:
        Mutual information [classes, filters] in nats, float64, on the device of the features.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.3], [5.0], [5.1], [5.2], [5.3]])
        >>> mutual_information(features, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        tensor([[0.7595],
                [0.7595]], dtype=torch.float64)
    """
    _check_features(features)
    if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1:
        raise ValueError(f"neighbors must be an integer of at least 1, but got {neighbors!r}; scikit-learn uses 3.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 filter, but got {chunk_size}; leave it out for the default.")
    counts = _class_counts(targets, num_classes)
    if len(targets) != len(features):
        raise ValueError(
            f"features and targets must have one row per sample, but features has {len(features)} rows and targets "
            f"has {len(targets)}; collect both from the same pass over the data."
        )
    plan = plan_labels(targets.long().to(features.device), counts.to(features.device), neighbors)
    responses = _scaled_with_noise(features, random_state)
    if chunk_size is None:
        chunk_size = _VALUES_PER_CHUNK.get(features.device.type, 2**22) // max(len(features), len(counts))
    chunk_size = max(1, min(chunk_size, _MOST_VALUES // (len(features) + len(counts) + 2 * neighbors)))
    sums = [digamma_sums(chunk.to(features.device), plan) for chunk in torch.split(responses, chunk_size)]
    return (plan.constant[:, None] - torch.cat(sums).T / plan.used[:, None]).clamp_min(0)


def mutual_information_score(mi: Tensor) -> Tensor:
    """Mutual information score (MIS): the mean over filters of the largest mutual information with any class.

    Liang et al., ECCV 2020, section 4.1 (https://arxiv.org/abs/2007.08194). At most the largest value of
    `mutual_information_bound`, reached when every filter tells one of the largest classes from the rest.

    Args:
        mi: Mutual information [classes, filters] in nats.

    Returns:
        Scalar in nats.

    Example:
        >>> mutual_information_score(torch.tensor([[0.3, 0.0, 0.1], [0.1, 0.2, 0.1]]))
        tensor(0.2000)
    """
    if mi.ndim != 2 or mi.numel() == 0:
        raise ValueError(
            f"mi must be a matrix [classes, filters] with at least one entry, but its shape is {list(mi.shape)}; "
            "pass the result of mutual_information()."
        )
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
    counts = _class_counts(targets, num_classes)
    share = counts.double() / counts.sum()
    return -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)


def _check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        found = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features must be a floating-point tensor [samples, filters], but got {found}; call .float().")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"features must have the shape [samples, filters], but it is {list(features.shape)}; "
            "average feature maps over height and width first."
        )
    if len(features) < 3:
        raise ValueError(f"the estimate needs at least 3 samples, but features has {len(features)}; pass more images.")
    wrong = int((~features.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"features must be finite, but {wrong} of {features.numel()} values are not "
            f"({int(features.isnan().sum())} NaN); check the model, or run it without half precision."
        )
    if features.device.type == "mps":
        raise TypeError("features must be on a device with float64, but MPS has none; pass features.cpu().")


def _class_counts(targets: Tensor, num_classes: int | None) -> Tensor:
    if not isinstance(targets, Tensor) or targets.dtype == torch.bool or targets.is_floating_point():
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be an integer tensor of class indices, but got {found}; call .long().")
    if targets.ndim != 1 or len(targets) == 0:
        raise ValueError(
            f"targets must have the shape [samples], at least one, but it is {list(targets.shape)}; "
            "turn one-hot rows into class indices with targets.argmax(1)."
        )
    smallest, largest = int(targets.min()), int(targets.max())
    num_classes = largest + 1 if num_classes is None else num_classes
    if smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"targets must hold class indices from 0 to {num_classes - 1}, but they range from {smallest} to "
            f"{largest}; drop unlabelled samples, or pass num_classes={max(largest + 1, 1)}."
        )
    return torch.bincount(targets.long(), minlength=num_classes)


def _scaled_with_noise(features: Tensor, random_state: int) -> Tensor:
    """scikit-learn's preparation, bit for bit, as [filters, samples] float64 on the CPU.

    NumPy and not torch, because the order of its sums and its generator decide the last bits, and these decide ties.
    """
    rows = features.detach().cpu().T.to(torch.float64, memory_format=torch.contiguous_format, copy=True).numpy()
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
        block += (amplitude * generator.standard_normal((block.shape[1], len(rows)))).T
    return torch.from_numpy(rows)
