"""What an evaluation transform does to the coordinates of a picture, for landmarks to follow it into the input."""

from __future__ import annotations

from typing import Any, NamedTuple


class Geometry(NamedTuple):
    """Where a picture's pixels lie in the input: x, y there = scale x (x, y here) + offset.

    Attributes:
        scale: Horizontal and vertical.
        offset: Horizontal and vertical, in pixels of the input.
        size: Width and height of the input.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]


def input_geometry(transform: Any, width: int, height: int) -> Geometry:
    """What an evaluation transform does to the coordinates of a picture, read from its steps.

    Known are the steps of ``timm.data.create_transform(is_training=False)`` in all its crop modes (``Resize``,
    ``ResizeKeepRatio``, ``CenterCrop``, ``CenterCropOrPad``, ``TrimBorder``) and those that leave coordinates alone.

    Args:
        transform: The transform, or one with ``.transforms``.
        width: Width of the picture in pixels.
        height: Its height.

    Returns:
        The geometry.

    Raises:
        ValueError: If a step is random or unknown; the message names it.

    Example:
        >>> from torchvision.transforms import CenterCrop, Compose, Resize
        >>> input_geometry(Compose([Resize(100), CenterCrop(100)]), width=400, height=200)
        Geometry(scale=(0.5, 0.5), offset=(-50.0, 0.0), size=(100, 100))
    """
    scale, offset, size = (1.0, 1.0), (0.0, 0.0), (width, height)
    for step in getattr(transform, "transforms", [transform]):
        kind = type(step).__name__
        new_size, shift = size, (0.0, 0.0)
        if kind == "Resize":
            new_size = _resized(step.size, getattr(step, "max_size", None), size)
        elif kind == "ResizeKeepRatio" and not step.random_scale_prob and not step.random_aspect_prob:
            ratios = size[1] / step.size[0], size[0] / step.size[1]
            ratio = max(ratios) * step.longest + min(ratios) * (1.0 - step.longest)
            new_size = (round(size[0] / ratio), round(size[1] / ratio))
        elif kind in ("CenterCrop", "CenterCropOrPad"):
            new_size = _width_and_height(step.size)
            shift = (_centre_crop(size[0], new_size[0]), _centre_crop(size[1], new_size[1]))
        elif kind == "TrimBorder":
            trim_x, trim_y = min(step.border_size, size[0]), min(step.border_size, size[1])
            shift, new_size = (-trim_x, -trim_y), (max(1, size[0] - 2 * trim_x), max(1, size[1] - 2 * trim_y))
        elif kind not in _LEAVE_COORDINATES:
            raise ValueError(
                f"landmarks cannot be tracked through the transform {kind}; use the transform for evaluation "
                "(is_training=False), or give landmarks in pixels of the input."
            )
        grow = (1.0, 1.0) if shift != (0.0, 0.0) or "Crop" in kind else (new_size[0] / size[0], new_size[1] / size[1])
        scale = (scale[0] * grow[0], scale[1] * grow[1])
        offset = (offset[0] * grow[0] + shift[0], offset[1] * grow[1] + shift[1])
        size = new_size
    return Geometry(scale, offset, size)


# fmt: off
_LEAVE_COORDINATES = frozenset([
    "ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ToNumpy", "ConvertImageDtype", "ToDtype",
    "ToImage", "ToPILImage", "Normalize", "Grayscale", "Identity",
])
# fmt: on


def _width_and_height(size: Any) -> tuple[int, int]:
    values = [size] if isinstance(size, int) else list(size)
    return int(values[-1]), int(values[0])


def _resized(wanted: Any, longest: int | None, size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(wanted, int) and len(wanted) == 2:
        return _width_and_height(wanted)
    short = wanted if isinstance(wanted, int) else wanted[0]
    long = int(short * max(size) / min(size))
    if longest is not None and long > longest:
        short, long = int(longest * short / long), longest
    return (short, long) if size[0] <= size[1] else (long, short)


def _centre_crop(length: int, wanted: int) -> float:
    """Shift of the coordinates along one axis; a picture that is too small is padded."""
    padded = length + (wanted - length) // 2 + (wanted - length + 1) // 2 if wanted > length else length
    return float(max(0, (wanted - length) // 2) - round((padded - wanted) / 2.0))
