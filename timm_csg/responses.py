"""How every filter responds to every class: sums that stream over pictures, and correlations from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from timm_csg.mechanisms.targets import class_rows


class ResponseSums(NamedTuple):
    """Sums over pictures, from which everything else follows; float64, they add up over batches and processes.

    Attributes:
        pictures: Their number, a scalar.
        response: Sum of each filter's response [filters].
        response_squared: Sum of its square [filters].
        target: Sum of each class's target: its number of pictures, or its share in soft targets [classes].
        target_squared: Sum of its square [classes].
        product: Sum of target × response [classes, filters].
    """

    pictures: Tensor
    response: Tensor
    response_squared: Tensor
    target: Tensor
    target_squared: Tensor
    product: Tensor

    @classmethod
    def of(cls, responses: Tensor, targets: Tensor, num_classes: int) -> ResponseSums:
        """The sums of one batch.

        Args:
            responses: [batch, filters].
            targets: Class indices [batch], soft or multi-hot rows [batch, classes].
            num_classes: Classes.
        """
        responses = responses.to(torch.float64 if responses.device.type != "mps" else torch.float32)
        rows = class_rows(targets, num_classes, responses.dtype)
        count = responses.new_tensor(len(responses))
        return cls(
            count, responses.sum(0), responses.square().sum(0), rows.sum(0), rows.square().sum(0), rows.T @ responses
        )

    def plus(self, other: ResponseSums) -> ResponseSums:
        """The sums of both."""
        return ResponseSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def of_all_processes(self) -> ResponseSums:
        """The sums of all processes of the running process group."""
        for part in self:
            dist.all_reduce(part)
        return self

    def mean(self) -> Tensor:
        """Mean of each filter's response [filters]."""
        return self.response / self.pictures

    def deviation(self) -> Tensor:
        """Standard deviation of each filter's response [filters]; 0 for one that is constant but for rounding."""
        mean_square = self.response_squared / self.pictures
        variance = mean_square - self.mean().square()
        return torch.where(variance > 1e-12 * mean_square, variance, 0.0).sqrt()


def correlation(sums: ResponseSums) -> Tensor:
    """Correlation of every filter's response with "is this class": the point-biserial one for class indices.

    Args:
        sums: Over the pictures.

    Returns:
        Pearson correlations in [-1, 1], float64 [classes, filters]; 0 for constant filters and for classes that all
        pictures or none have.

    Example:
        >>> responses = torch.tensor([[1.0, 5.0], [1.0, 5.0], [0.0, 5.0], [0.0, 5.0]])
        >>> correlation(ResponseSums.of(responses, torch.tensor([0, 0, 1, 1]), num_classes=2))
        tensor([[ 1.,  0.],
                [-1.,  0.]], dtype=torch.float64)
    """
    share = sums.target / sums.pictures
    covariance = sums.product / sums.pictures - share[:, None] * sums.mean()
    spread = (sums.target_squared / sums.pictures - share.square()).clamp(min=0).sqrt()[:, None] * sums.deviation()
    return torch.where(spread > 0, covariance / spread.clamp(min=1e-300), 0.0).clamp(-1, 1)
