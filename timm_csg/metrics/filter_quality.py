"""Measures of single filters from the nearest relatives of class-specific filters: QPM, CHiQPM and MonoLoss.

They are here for comparison with published numbers. None of them knows owners; what each rewards is in its docstring.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from timm_csg.metrics._checks import check_features, check_rows, class_counts
from timm_csg.metrics.class_specificity import class_sums, filter_chunks


def contrastiveness(features: Tensor, *, random_state: int = 0) -> Tensor:
    """How clearly each filter is either on or off: 1 - overlap of two Gaussians fitted to its responses.

    The overlapping coefficient of the two components of a mixture (scikit-learn's ``GaussianMixture``), each taken with
    weight 1, as in QPM (Norrenbrock et al., ICLR 2025); the number to report is the mean. Responses are standardised
    first, so that the scale of a filter does not matter. A filter that is exactly 0 for many pictures, as behind a
    ReLU, has one component at 0 with hardly any width and so a high value, whatever its other responses are.

    Args:
        features: Pooled responses [samples, filters], floating point, finite, at least 2 samples. About 0.1 s a filter.
        random_state: Seed of the fit's start.

    Returns:
        [filters], float64 in [0, 1], no unit; 0 for constant filters.

    Raises:
        TypeError, ValueError: If features are not as stated.

    Example:
        >>> contrastiveness(torch.tensor([[0.0, 1.0], [0.1, 1.0], [5.0, 1.0], [5.1, 1.0]]))
        tensor([1., 0.], dtype=torch.float64)
    """
    from sklearn.mixture import GaussianMixture

    check_features(features, samples=2)
    result = torch.zeros(features.shape[1], dtype=torch.float64, device="cpu")
    for index, column in enumerate(features.detach().T):
        if column.amax() == column.amin():
            continue
        values = column.cpu().double()
        values = (values - values.mean()) / values.std()
        mixture = GaussianMixture(2, random_state=random_state).fit(values.numpy()[:, None])
        first, second = (
            NormalDist(float(mean), float(variance) ** 0.5)
            for mean, variance in zip(mixture.means_.ravel(), mixture.covariances_.ravel(), strict=True)
        )
        result[index] = 1 - first.overlap(second)
    return result


def class_independence(features: Tensor, targets: Tensor, num_classes: int | None = None) -> Tensor:
    """How little of each filter's response goes to a single class: 1 - the largest class's share.

    1 - max over classes of sum over the class of (f - min f) / sum over all pictures of (f - min f), as in QPM
    (Norrenbrock et al., ICLR 2025); the number to report is the mean. QPM shares filters among classes and wants it
    high; **filters with one owner each have it low**. Frequent classes lower it.

    Args:
        features: Pooled responses [samples, filters], floating point, finite.
        targets: Class indices [samples], integers.
        num_classes: Number of classes; the largest target + 1 if left out. It does not change the result.

    Returns:
        [filters], float64 from 0 (all for one class) to 1 - 1 / classes, no unit; 1 for constant filters.

    Raises:
        TypeError, ValueError: If features or targets are not as stated.

    Example:
        >>> class_independence(torch.tensor([[3.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1, 1]))
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    check_features(features)
    counts = class_counts(targets, num_classes)
    check_rows(features, targets)
    result = []
    for chunk in filter_chunks(features, len(counts)):
        above = _from_zero_to_one(chunk)
        total = above.sum(dim=0)
        result.append(1 - class_sums(above, targets, len(counts)).amax(dim=0) / total.where(total > 0, 1))
    return torch.cat(result)


def spatial_diversity(maps: Tensor) -> Tensor:
    """How far the filters of one class look at different places: SID@k for the k filters given.

    Sum over positions of the maximum over the k filters of softmax over positions(map / mean |map|), / k, as in QPM and
    CHiQPM (Norrenbrock et al., ICLR and NeurIPS 2025), who report SID@5: for each picture the five filters with the
    largest weights for the predicted class. Filters with no preferred place agree everywhere, which lowers it too.

    Args:
        maps: Maps of the chosen filters of each picture [samples, k, height, width], floating point.

    Returns:
        [samples], float64 from 1 / k (all filters in one place) to 1 (all in different ones), no unit.

    Raises:
        ValueError: If maps are not [samples, k, height, width].

    Example:
        >>> spatial_diversity(torch.tensor([[[[90.0, 0.0, 0.0, 0.0, 0.0, 0.0]], [[0.0, 9.0, 0.0, 0.0, 0.0, 0.0]]]]))
        tensor([0.9927], dtype=torch.float64)
    """
    if not isinstance(maps, Tensor) or maps.ndim != 4 or 0 in maps.shape[1:]:
        found = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(
            f"maps must be [samples, chosen filters, height, width], but are {found}; "
            "gather the filters of each picture's class, for example the five with the largest weights."
        )
    values = maps.detach().double().flatten(2)
    values = values / values.abs().mean(dim=2, keepdim=True).clamp_min(1e-5)
    return values.softmax(dim=2).amax(dim=1).sum(dim=1) / maps.shape[1]


def mono_score(features: Tensor, embeddings: Tensor) -> Tensor:
    """Monosemanticity score: how alike the pictures are to which a filter responds, in the eyes of another encoder.

    Mean cosine similarity of all pairs of pictures, weighted by the product of the filter's responses a, scaled to
    [0, 1] by their minimum and maximum (Pach et al., 2025, https://arxiv.org/abs/2504.02821). In linear time, as in
    MonoLoss (https://arxiv.org/abs/2602.12403): (‖Σ aᵢ eᵢ‖² - Σ aᵢ²) / ((Σ aᵢ)² - Σ aᵢ²) with unit embeddings e.
    It uses no labels. Its level depends on the encoder, whose embeddings often all lie close together: compare models
    with one encoder, and with the mean similarity of all pairs, which a filter that responds to everything has.

    Args:
        features: Pooled responses [samples, filters], floating point, finite, at least 2 samples.
        embeddings: Of the same pictures by an independent encoder [samples, dimensions]; normalised here.

    Returns:
        [filters], float64 in [-1, 1], no unit; 0 for filters that respond to less than two pictures.

    Raises:
        TypeError, ValueError: If features or embeddings are not as stated, or not of the same pictures.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> mono_score(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), embeddings)
        tensor([1., 0.], dtype=torch.float64)
    """
    check_features(features, samples=2)
    check_features(embeddings, samples=2)
    if len(features) != len(embeddings):
        raise ValueError(
            f"features and embeddings must be of the same pictures, but there are {len(features)} and "
            f"{len(embeddings)}; encode the pictures in the order of the features."
        )
    units = torch.nn.functional.normalize(embeddings.detach().double().to(features.device))
    scores = []
    for chunk in filter_chunks(features, embeddings.shape[1]):
        weights = _from_zero_to_one(chunk)
        alone = weights.square().T @ units.square().sum(dim=1)
        pairs = weights.sum(dim=0).square() - weights.square().sum(dim=0)
        similarity = (weights.T @ units).square().sum(dim=1) - alone
        scores.append((similarity / pairs.where(pairs > 1e-12, 1)).where(pairs > 1e-12, 0))
    return torch.cat(scores)


def _from_zero_to_one(chunk: Tensor) -> Tensor:
    """Each filter's responses scaled by their minimum and maximum, float64; constant ones 0."""
    above = chunk.double() - chunk.amin(dim=0).double()
    largest = above.amax(dim=0)
    return above / largest.where(largest > 0, 1)
