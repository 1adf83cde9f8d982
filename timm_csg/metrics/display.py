"""A ``repr`` of one line for results that hold tensors: of large ones the type and the shape."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

_MOST_ENTRIES = 8
Result = TypeVar("Result")


def in_one_line(result: type[Result]) -> type[Result]:
    """Give a named tuple or a dataclass a ``repr`` of one line; a decorator.

    Example:
        >>> from timm_csg.metrics import Ablation
        >>> import torch
        >>> Ablation(torch.ones(2), torch.zeros(20, 20))
        Ablation(before=tensor([1., 1.]), after=<float32 [20, 20]>)
    """
    result.__repr__ = _one_line  # type: ignore[method-assign]
    return result


def _one_line(result: Any) -> str:
    names = [field.name for field in dataclasses.fields(result)] if dataclasses.is_dataclass(result) else result._fields
    parts = ", ".join(f"{name}={short(getattr(result, name))}" for name in names)
    return f"{type(result).__name__}({parts})"


def short(value: Any) -> str:
    """A value in a few words.

    Example:
        >>> short(0.123456), short(list(range(100))), short({"a": None})
        ('0.1235', '<100 items>', "{'a': None}")
    """
    if isinstance(value, Tensor) and value.numel() > _MOST_ENTRIES:
        return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}>"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | dict) and len(value) > _MOST_ENTRIES:
        return f"<{len(value)} items>"
    return repr(value)
