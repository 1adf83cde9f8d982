"""Shares of images with the interval that few images leave open; sensitivity and specificity of each class."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.checks import whole
from timm_csg.metrics.display import in_one_line


class Proportion(NamedTuple):
    """A share of images, and where that of all images of the kind lies.

    Attributes:
        share: Hits / total; NaN without images.
        low: Lower end of the interval.
        high: Upper end.
    """

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.3f} ({self.low:.3f} to {self.high:.3f})"


def wilson_interval(hits: int, total: int, *, confidence: float = 0.95) -> Proportion:
    """A share with Wilson's score interval, which holds for few images, and for shares of 0 and 1.

    (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n), z the normal quantile of the confidence (Wilson, Journal of
    the American Statistical Association 1927, https://doi.org/10.1080/01621459.1927.10502953). It covers the choice of
    the images, not that of the training seed.

    Args:
        hits: Images that were right.
        total: Images.
        confidence: Of the interval, between 0 and 1.

    Returns:
        The share and its interval; NaN, 0 and 1 without images.

    Raises:
        ValueError: If hits are not between 0 and total, or the confidence is not between 0 and 1.

    Example:
        >>> print(wilson_interval(35, 36))
        0.972 (0.858 to 0.995)
        >>> print(wilson_interval(36, 36))
        1.000 (0.904 to 1.000)
    """
    number, count = whole(hits), whole(total)
    if number is None or count is None or not 0 <= number <= count:
        raise ValueError(f"hits must be a whole number from 0 to total, but hits={hits!r} and total={total!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, but is {confidence!r}.")
    if count == 0:
        return Proportion(float("nan"), 0.0, 1.0)
    share, z = number / count, NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = share + z**2 / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((middle + sign * reach) / (1 + z**2 / count) for sign in (-1, 1))
    return Proportion(share, 0.0 if number == 0 else low, 1.0 if number == count else high)


def accuracy_interval(logits: Tensor, targets: Tensor, *, confidence: float = 0.95) -> Proportion:
    """Accuracy with ``wilson_interval`` (Wilson, 1927).

    Args:
        logits: [samples, classes].
        targets: Class indices [samples].
        confidence: Of the interval.

    Returns:
        The accuracy with the ends of its interval, from 0 to 1.

    Example:
        >>> print(accuracy_interval(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])))
        0.500 (0.095 to 0.905)
    """
    hits = int((logits.argmax(dim=1) == targets).sum())
    return wilson_interval(hits, len(targets), confidence=confidence)


@in_one_line
class ClassRates(NamedTuple):
    """What ``class_rates`` returns; shares, float64 [classes], and intervals [classes, 2].

    Attributes:
        sensitivity: Share of a class's images that are given the class (recall); NaN without such images.
        specificity: Share of the other images that are not given the class; NaN without other images.
        sensitivity_interval: Wilson's interval, low and high.
        specificity_interval: Wilson's interval, low and high.
    """

    sensitivity: Tensor
    specificity: Tensor
    sensitivity_interval: Tensor
    specificity_interval: Tensor


def class_rates(logits: Tensor, targets: Tensor, num_classes: int, *, confidence: float = 0.95) -> ClassRates:
    """Sensitivity and specificity of every class against the rest, with ``wilson_interval`` (Wilson, 1927).

    With two classes the sensitivity of one is the specificity of the other.

    Args:
        logits: [samples, classes].
        targets: Class indices [samples].
        num_classes: Number of classes.
        confidence: Of the intervals.

    Returns:
        The rates.

    Example:
        >>> rates = class_rates(torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]), 2)
        >>> rates.sensitivity, rates.specificity
        (tensor([1.0000, 0.5000], dtype=torch.float64), tensor([0.5000, 1.0000], dtype=torch.float64))
    """
    predicted = logits.argmax(dim=1)
    shown = torch.bincount(targets, minlength=num_classes).tolist()
    given = torch.bincount(predicted, minlength=num_classes).tolist()
    right = torch.bincount(targets[predicted == targets], minlength=num_classes).tolist()
    samples = len(targets)
    rates: dict[str, list[Proportion]] = {"sensitivity": [], "specificity": []}
    for its, named, hits in zip(shown, given, right, strict=True):
        rates["sensitivity"].append(wilson_interval(hits, its, confidence=confidence))
        others = samples - its
        rates["specificity"].append(wilson_interval(others - (named - hits), others, confidence=confidence))
    columns = {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in rates.items()}
    return ClassRates(*(c[:, 0] for c in columns.values()), *(c[:, 1:] for c in columns.values()))
