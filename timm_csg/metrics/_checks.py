"""What the metrics of pooled responses ask of their arguments, said once."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_csg.checks import check_class_indices


def check_features(features: Tensor, *, samples: int = 1) -> None:
    """Raise unless these are finite floating-point responses [samples, filters] of at least so many samples."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        found = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features must be a floating-point tensor [samples, filters], but got {found}; call .float().")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"features must have the shape [samples, filters], but it is {list(features.shape)}; "
            "average feature maps over height and width first."
        )
    if len(features) < samples:
        least = "1 sample" if samples == 1 else f"{samples} samples"
        raise ValueError(f"the estimate needs at least {least}, but features has {len(features)}; pass more images.")
    wrong = sum(int((~rows.isfinite()).sum()) for rows in features.split(2**15))  # never a copy of all
    if wrong:
        raise ValueError(
            f"features must be finite, but {wrong} of {features.numel()} values are not "
            f"({int(features.isnan().sum())} NaN); check the model, or run it without half precision."
        )
    if features.device.type == "mps":
        raise TypeError("features must be on a device with float64, but MPS has none; pass features.cpu().")


def check_rows(features: Tensor, targets: Tensor) -> None:
    """Raise unless there is one target for every sample."""
    if len(targets) != len(features):
        raise ValueError(
            f"features and targets must have one row per sample, but features has {len(features)} rows and targets "
            f"has {len(targets)}; collect both from the same pass over the data."
        )


def class_counts(targets: Tensor, num_classes: int | None) -> Tensor:
    """Samples of every class, int64 [classes]; raises unless targets are class indices below ``num_classes``."""
    check_class_indices(targets, num_classes)
    return torch.bincount(targets.long(), minlength=num_classes or 0)
