"""What the metrics that run a model need to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_channels_last(model: nn.Module) -> bool:
    """Whether 4-D features are [batch, height, width, filters]; timm says so in ``output_fmt``."""
    return str(getattr(model, "output_fmt", "NCHW")) == "NHWC"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def seen_features(model: nn.Module, images: Tensor) -> Tensor:
    """The features as the head sees them without a label: behind the mechanism, if that acts at inference (ICNN)."""
    timm_model: Any = model  # its methods are not in nn.Module's type
    features: Tensor = timm_model.forward_features(images)
    mechanism = getattr(model, "mechanism", None)
    if getattr(mechanism, "acts_without_targets", False):
        features = timm_model.mechanism(features)
    return features


def seen_maps(model: nn.Module, images: Tensor) -> Tensor:
    """The same as maps [batch, filters, height, width], whatever their layout.

    Raises:
        ValueError: If the features are no map.
    """
    features = seen_features(model, images)
    if features.ndim != 4:
        raise ValueError(
            f"{type(model).__name__} has tokens instead of a map of features, so its filters have no place in the "
            "image; use a model with a map, see find_stage(model).layout."
        )
    return features.permute(0, 3, 1, 2) if is_channels_last(model) else features
