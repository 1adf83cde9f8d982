"""What a training's first batch tells: mistakes that training would hide, or answer in the words of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from timm_csg.hooks import check_hooks
from timm_csg.running import warn_of_pixels

_NO_TENSORS = ("builtins", "numpy", "pathlib", "PIL")


def check_kind(images: Any) -> None:
    """Raise unless images are what a timm model takes: a tensor of floating-point numbers, or NaFlex's patches.

    Raises:
        TypeError: With what to pass instead.
    """
    if isinstance(images, Tensor):
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating-point numbers, normalised as the model expects, but are {images.dtype}; see "
                "timm.data.create_transform, or timm's create_loader, which normalises."
            )
    elif isinstance(images, Mapping):
        if "patches" not in images:
            keys = ", ".join(map(repr, list(images)[:6]))
            raise TypeError(f"images are a dictionary with {keys}; pass the tensor in it, such as batch['image'].")
    elif type(images).__module__.partition(".")[0] in _NO_TENSORS:  # others may stand for one, as when tracing
        raise TypeError(
            f"images must be a tensor [batch, channels, height, width], but found {type(images).__name__}; "
            "timm_csg.explain.as_batch(model, images) makes one of files, Pillow images and arrays."
        )


def check_first_batch(model: Any, images: Any, targets: Any) -> None:
    """Raise or warn where a batch shows a mistake; it looks at all values, which takes too long for every batch.

    Args:
        model: A timm classifier.
        images: What should be its input.
        targets: Class indices [batch], or rows [batch, classes].

    Raises:
        TypeError: If images are of another kind, see ``check_kind``, or class indices are not whole numbers.
        ValueError: If a class index is not a class of the model, or a hook changes what the model returns, see
            ``hooks.check_hooks``.
    """
    check_kind(images)
    if isinstance(images, Tensor):
        warn_of_pixels(model, images)
        check_hooks(model)
    classes = int(getattr(model, "num_classes", 0))
    if not isinstance(targets, Tensor) or targets.ndim != 1 or classes < 2 or targets.is_meta or len(targets) == 0:
        return
    if targets.is_floating_point():
        raise TypeError(f"targets must be class indices, whole numbers, but are {targets.dtype}; call targets.long().")
    largest = int(targets.max())
    if largest >= classes:
        raise ValueError(
            f"targets must hold class indices below {classes}, but the largest is {largest}; pass "
            f"num_classes={largest + 1} to differentiate(), or relabel the data set: classes are counted from 0."
        )
