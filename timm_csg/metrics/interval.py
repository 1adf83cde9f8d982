"""How far a number measured on these images may be from what other images of the same kind would give.

The usual bootstrap draws images with replacement. A nearest-neighbour estimate takes an image that was drawn twice for
a perfect neighbour of itself, so its values rise (the MIS nearly doubles in our simulations) and their spread means
nothing; Abadie & Imbens, Econometrica 2008 (https://doi.org/10.3982/ECTA6474), show that this bootstrap is invalid for
nearest-neighbour statistics however many the samples. Here each resample is a random half of the images *without*
replacement, as in the delete-d jackknife of Shao & Wu, Annals of Statistics 1989
(https://doi.org/10.1214/aos/1176347263) with d = half, and as Holmes & Nemenman, Physical Review E 2019
(https://arxiv.org/abs/1903.09280) do for such estimates of mutual information: the variance falls as 1 / samples, and
that of half of the images around the mean of the halves is that of all images around the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.metrics.display import in_one_line
from timm_csg.metrics.information import mutual_information, mutual_information_score


@in_one_line
class Interval(NamedTuple):
    """An estimate and where it would lie with other images; all of the statistic's shape.

    Attributes:
        estimate: The statistic of all images.
        low: Lower end.
        high: Upper end.
        standard_error: Half the width divided by the normal quantile of the confidence (1.96 for 0.95).
    """

    estimate: Tensor
    low: Tensor
    high: Tensor
    standard_error: Tensor


def half_sample_interval(
    statistic: Callable[[Tensor], Tensor | float],
    targets: Tensor,
    *,
    resamples: int = 100,
    confidence: float = 0.95,
    random_state: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Interval:
    """Confidence interval of any statistic of images, from random halves of them without replacement.

    estimate ± z × standard error, and standard error² = m / (n - m) × variance over resamples of the statistic of m of
    the n images, the delete-d jackknife with m = n - d = half. Every resample takes half of each class, so that the
    shares of the classes, and with them the bound of the MIS, stay as they are. It covers what other images of the
    same classes would give, with the same number of them: neither the bias of an estimator, nor another training seed.
    It needs tens of images in each class, and a statistic that averages over images; not a maximum.

    Args:
        statistic: Takes the indices [m] of some images, returns a number or a tensor.
        targets: Class indices [samples].
        resamples: Halves drawn; with 100 the width is known to 7 %.
        confidence: Share of such intervals that hold the truth.
        random_state: Seed of the halves; the global random state is not used.
        progress: Called with 1 after each resample.

    Returns:
        The interval.

    Raises:
        ValueError: If targets are not at least 4 class indices, or an option is out of its range.

    Example:
        >>> hits = torch.tensor([1.0, 0.0, 1.0, 1.0] * 50)
        >>> interval = half_sample_interval(lambda images: hits[images].mean(), torch.zeros(200, dtype=torch.long))
        >>> round(float(interval.estimate), 2), round(float(interval.standard_error), 2)  # sqrt(.75 × .25 / 200) = .031
        (0.75, 0.03)
    """
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, but is {resamples}; 100 estimate the width to within 7 %.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, but is {confidence}; for 95 % pass 0.95.")
    targets, generator = targets.cpu(), torch.Generator().manual_seed(random_state)
    if targets.ndim != 1 or len(targets) < 4:
        raise ValueError(f"targets must be class indices for at least 4 images, but have shape {list(targets.shape)}.")
    estimate = torch.as_tensor(statistic(torch.arange(len(targets), device="cpu")), device="cpu").double()
    drawn, sizes = [], []
    for _ in range(resamples):
        half = random_half(targets, generator)
        sizes.append(len(half))
        drawn.append(torch.as_tensor(statistic(half), device="cpu").double().cpu())
        if progress is not None:
            progress(1)
    size = sum(sizes) / resamples
    standard_error = torch.stack(drawn).std(dim=0).to(estimate.device) * (size / (len(targets) - size)) ** 0.5
    width = NormalDist().inv_cdf((1 + confidence) / 2) * standard_error
    return Interval(estimate, estimate - width, estimate + width, standard_error)


def random_half(targets: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of a random half of every class, in ascending order; the odd one of a class is in or out by chance.

    Args:
        targets: Class indices [samples].
        generator: Source of chance.

    Returns:
        Indices, int64.

    Example:
        >>> random_half(torch.tensor([0, 0, 0, 0, 1, 1]), torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    by_chance = torch.rand(len(targets), generator=generator, device="cpu").argsort()
    order = by_chance[targets[by_chance].argsort(stable=True)]  # class by class, by chance within
    counts = torch.bincount(targets)
    place = torch.arange(len(targets), device="cpu") - (counts.cumsum(0) - counts)[targets[order]]
    odd_one = torch.randint(0, 2, counts.shape, generator=generator, device="cpu")
    return order[place < ((counts + odd_one) // 2)[targets[order]]].sort().values


def mutual_information_score_interval(
    features: Tensor,
    targets: Tensor,
    num_classes: int | None = None,
    *,
    resamples: int = 100,
    confidence: float = 0.95,
    neighbors: int = 3,
    random_state: int = 0,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Interval:
    """Confidence interval of the mutual information score (MIS); see ``half_sample_interval`` for how and why.

    The estimator's own bias stays in it: with few images MIS is too high, as it is the mean of maxima of noisy values.
    So compare two models on the same number of images. Costs as much as ``resamples`` / 2 estimates.

    Args:
        features: Pooled responses [samples, filters].
        targets: Class indices [samples].
        num_classes: Number of classes; the largest target + 1 if left out.
        resamples: Halves drawn.
        confidence: Share of such intervals that hold the score expected of that many images.
        neighbors: Neighbours k of the estimator.
        random_state: Seed of halves and noise.
        threads: CPU threads, see ``mutual_information``.
        progress: Called with 1 after each resample.

    Returns:
        The interval in nats.

    Example:
        >>> targets = torch.arange(200) % 2
        >>> features = torch.linspace(0, 1, 200)[:, None] + 0.5 * targets[:, None]
        >>> interval = mutual_information_score_interval(features, targets, resamples=10)
        >>> bool(interval.low < interval.estimate < interval.high)
        True
    """

    def score(images: Tensor) -> Tensor:
        chosen = images.to(features.device)
        options = {"neighbors": neighbors, "random_state": random_state, "threads": threads}
        mi = mutual_information(features[chosen], targets.to(features.device)[chosen], num_classes, **options)
        return mutual_information_score(mi)

    return half_sample_interval(
        score, targets, resamples=resamples, confidence=confidence, random_state=random_state, progress=progress
    )
