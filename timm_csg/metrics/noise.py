"""What a number comes to where there is nothing to find: the same images with shuffled labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.checks import whole
from timm_csg.metrics.display import in_one_line


@in_one_line
class NoiseFloor(NamedTuple):
    """What ``noise_floor`` returns; a number must lie clearly above it to mean anything.

    Attributes:
        mean: Of the statistic over the shuffles.
        deviation: Its standard deviation over the shuffles; NaN for a single one.
    """

    mean: float
    deviation: float


def noise_floor(
    statistic: Callable[[Tensor], Tensor | float], targets: Tensor, *, shuffles: int = 5, random_state: int = 0
) -> NoiseFloor:
    """A statistic of images with their labels shuffled: every class keeps its size, and nothing tells of it.

    Estimates of mutual information, and whatever picks the best of several classes, do not come out as 0 on few images.

    Args:
        statistic: Called with targets [samples], returns a number: for the MIS
            ``lambda targets: mutual_information_score(mutual_information(features, targets, num_classes))``.
        targets: Class indices [samples].
        shuffles: How many.
        random_state: Seed of the shuffles.

    Returns:
        Mean and standard deviation.

    Raises:
        ValueError: If ``shuffles`` is not 1 or more.

    Example:
        >>> targets = torch.tensor([0, 0, 1, 1])
        >>> round(noise_floor(lambda shuffled: (shuffled == targets).double().mean(), targets, shuffles=1000).mean, 1)
        0.5
    """
    if (whole(shuffles) or 0) < 1:
        raise ValueError(f"shuffles must be a whole number, 1 or more, but is {shuffles!r}.")
    generator = torch.Generator().manual_seed(random_state)
    orders = (
        torch.randperm(len(targets), generator=generator, device="cpu").to(targets.device) for _ in range(shuffles)
    )
    values = torch.tensor([float(statistic(targets[order])) for order in orders], dtype=torch.float64, device="cpu")
    return NoiseFloor(float(values.mean()), float(values.std()) if shuffles > 1 else float("nan"))
