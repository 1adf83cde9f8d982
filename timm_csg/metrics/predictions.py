"""How often logits name the right class."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of samples whose largest logit is the target's.

    Args:
        logits: [samples, classes].
        targets: Class indices [samples].

    Returns:
        From 0 to 1.

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
        0.5
    """
    return float((logits.argmax(dim=1) == targets).double().mean())


def accuracy_per_class(logits: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The same for each class.

    Args:
        logits: [samples, classes].
        targets: Class indices [samples].
        num_classes: Number of classes.

    Returns:
        Shares, float64 [classes]; NaN for a class without samples.

    Example:
        >>> accuracy_per_class(torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]), 2)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    hits = (logits.argmax(dim=1) == targets).double()
    return torch.bincount(targets, weights=hits, minlength=num_classes) / torch.bincount(targets, minlength=num_classes)
