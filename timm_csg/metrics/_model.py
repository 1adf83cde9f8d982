"""What the metrics that run a model need to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
