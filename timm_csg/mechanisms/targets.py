"""From targets of any kind to one row of a class-filter matrix per image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def target_rows(matrix: Tensor, targets: Tensor) -> Tensor:
    """The row of a class-filter matrix that each image's target stands for, for any of the three kinds of targets.

    Args:
        matrix: Class-filter matrix [classes, filters].
        targets: Class indices [batch]; or [batch, classes]: floating-point rows that sum to 1 are soft targets (mixup,
            label smoothing) and mix the rows; rows of zeros and ones with another sum are multi-hot and take the
            largest entry over the classes present.

    Returns:
        Rows [batch, filters].

    Raises:
        TypeError: If targets are not an integer, boolean or floating-point tensor.
        ValueError: If their shape or values fit none of the three kinds.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
        >>> target_rows(matrix, torch.tensor([1]))
        tensor([[0.5000, 1.0000]])
        >>> target_rows(matrix, torch.tensor([[0.5, 0.5]]))
        tensor([[0.7500, 0.5000]])
        >>> target_rows(matrix, torch.tensor([[1, 1]]))
        tensor([[1., 1.]])
    """
    if _are_indices(targets, len(matrix)):
        return F.embedding(targets.long(), matrix)
    weights, multi_hot = _checked_rows(targets, matrix.dtype)
    if not targets.is_floating_point():
        return _strongest_row(matrix, weights)
    if _can_look(targets) and not multi_hot.any():
        return weights @ matrix
    return torch.where(multi_hot[:, None], _strongest_row(matrix, weights), weights @ matrix)


def check_targets(images: Any, targets: Any, paths: Any) -> None:
    """Check that there is a target for every image, and that targets and paths are no other input of the timm model.

    Raises:
        TypeError: If targets are no tensor, or coordinates [batch, patches, 2], or paths are a tensor, as NaFlexViT's
            patch_coord and patch_valid.
        ValueError: If there are more or fewer targets than images; a single one would count for all in silence.
    """
    if isinstance(paths, Tensor) or (isinstance(targets, Tensor) and targets.ndim == 3 and targets.shape[2] == 2):
        raise TypeError(
            "behind the images, a differentiated model takes targets [batch] or [batch, classes] and paths; name what "
            "else the timm model takes: model(patches, patch_coord=..., patch_valid=...)."
        )
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(
            f"targets must be a tensor of class indices, soft targets or multi-hot rows, but are a "
            f"{type(targets).__name__}; pass torch.as_tensor(targets)."
        )
    if isinstance(targets, Tensor) and isinstance(images, Tensor) and targets.shape[:1] != images.shape[:1]:
        one = f"no targets [batch], but {str(targets.dtype).removeprefix('torch.')} of shape []"
        raise ValueError(f"there are {len(images)} images but {f'{len(targets)} targets' if targets.ndim else one}.")


def class_rows(targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Targets of any kind as rows [batch, classes]: ``target_rows`` of the unit matrix, which is never made.

    Raises:
        TypeError, ValueError: As ``target_rows``.

    Example:
        >>> class_rows(torch.tensor([1, 0]), 3, torch.float32)
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """
    if _are_indices(targets, num_classes):
        return (targets[:, None] == torch.arange(num_classes, device=targets.device)).to(dtype)
    return _checked_rows(targets, dtype)[0]


def is_soft(targets: Tensor) -> bool:
    """Whether targets are rows of probabilities: floating point, each with a sum of 1.

    Inside a compiled call, where values cannot be looked at, all floating-point rows count as such.

    Example:
        >>> is_soft(torch.tensor([[0.7, 0.3]])), is_soft(torch.tensor([[1.0, 1.0]])), is_soft(torch.tensor([1, 0]))
        (True, False, False)
    """
    if targets.ndim != 2 or not targets.is_floating_point():
        return False
    return not _can_look(targets) or bool(((targets.sum(dim=1) - 1).abs() <= 1e-2).all())


def _are_indices(targets: Tensor, num_classes: int) -> bool:
    """Whether targets are class indices, in range as far as can be seen, and not rows [batch, classes]."""
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise TypeError(
            f"targets must be a tensor of class indices, soft targets or multi-hot rows, but are {type(targets)}."
        )
    if targets.ndim == 1 and not targets.is_floating_point() and targets.dtype != torch.bool:
        _check_indices(targets, num_classes)
        return True
    if targets.ndim != 2 or targets.shape[1] != num_classes:
        raise ValueError(
            f"targets must be integer class indices [batch] or rows [batch, {num_classes}], but are "
            f"{str(targets.dtype).removeprefix('torch.')} of shape {list(targets.shape)}."
        )
    return False


def _checked_rows(targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of targets in a dtype, and which of them are multi-hot."""
    weights = targets.to(dtype)
    if targets.is_floating_point():
        multi_hot = (weights.sum(dim=1) - 1).abs() > 1e-2
    else:
        multi_hot = torch.ones_like(weights[:, 0], dtype=torch.bool)
    _check_rows(weights, multi_hot)
    return weights, multi_hot


def _check_indices(targets: Tensor, num_classes: int) -> None:
    """Check the range where looking costs nothing; on an accelerator the embedding kernel asserts the same."""
    if targets.device.type != "cpu" or not _can_look(targets) or targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0:
        raise ValueError(f"targets must be class indices from 0 to {num_classes - 1}, but the smallest is {low}.")
    if high >= num_classes:
        raise ValueError(
            f"targets must hold class indices below {num_classes}, but the largest is {high}; "
            f"pass num_classes={high + 1} to differentiate(), or relabel the data set."
        )


def _can_look(tensor: Tensor) -> bool:
    """Whether Python may read the values: not while compiling, on the meta device, or under vmap."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _check_rows(weights: Tensor, multi_hot: Tensor) -> None:
    if not _can_look(weights):
        return
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(
            f"rows of targets must lie in [0, 1], but reach from {weights.min():g} to {weights.max():g}; "
            "pass probabilities (soft targets) or zeros and ones (multi-hot), not logits."
        )
    odd = multi_hot & ((weights != 0) & (weights != 1)).any(dim=1)
    if odd.any():
        row = int(odd.nonzero()[0])
        raise ValueError(
            f"row {row} of targets sums to {float(weights[row].sum()):g}: neither soft targets (a sum of 1) nor "
            "multi-hot (zeros and ones only); normalise the row, or pass the classes present as ones."
        )


def _strongest_row(matrix: Tensor, weights: Tensor) -> Tensor:
    """Largest entry over the classes present; some classes at a time, all at once would be batch × matrix."""
    rows = weights.new_zeros(weights.shape[0], matrix.shape[1])
    for present, part in zip(weights.split(32, dim=1), matrix.split(32), strict=True):
        rows = torch.maximum(rows, (present[:, :, None] * part).amax(dim=1))
    return rows
