"""Checks of what callers pass: plain numbers, names with the nearest right one, class indices."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor


def whole(value: Any) -> int | None:
    """The int that an integer of any type stands for (NumPy's, a tensor's); None for anything else, and for booleans.

    Example:
        >>> whole(3), whole(3.0), whole(True)
        (3, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several values
        return None


def plain_number(value: Any) -> Any:
    """An int or float for a number of another type, such as NumPy's, so that JSON can hold it; anything else as it is.

    Example:
        >>> from fractions import Fraction
        >>> plain_number(Fraction(1, 2)), plain_number("a"), plain_number(True)
        (0.5, 'a', True)
    """
    if isinstance(value, (bool, int)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def make_numbers_plain(instance: Any) -> None:
    """``plain_number`` for all fields of a dataclass, a frozen one too."""
    for field in fields(instance):
        object.__setattr__(instance, field.name, plain_number(getattr(instance, field.name)))


def check_fraction(name: str, value: Any, low: float = 0.0, high: float | None = None) -> None:
    """Raise a ValueError unless ``value`` is a finite number from ``low`` to ``high``."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or value != value or value < low or value == float("inf") or (high is not None and value > high):
        bounds = f"{low:g} or more" if high is None else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be a number, {bounds}, but is {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}, but is {value!r}.{nearest(value, choices)}")


def nearest(name: Any, names: Iterable[str], most: int = 1) -> str:
    """A question to put behind an error about a misspelt name, with a space before it; empty where none is near.

    Args:
        name: The misspelt name.
        names: The valid ones.
        most: How many to suggest at most.

    Example:
        >>> nearest("sparsty_weight", ["gated_weight", "sparsity_weight"]), nearest("x", ["gate"])
        (" Did you mean 'sparsity_weight'?", '')
    """
    found = get_close_matches(name, list(names), n=most) if isinstance(name, str) else []
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def check_class_indices(targets: Any, num_classes: int | None = None) -> None:
    """Raise unless these are class indices, at least one, and below ``num_classes`` where that is known.

    Raises:
        TypeError: If they are no integer tensor.
        ValueError: If their shape is not [samples], or an index is out of range.
    """
    if not isinstance(targets, Tensor):
        found = type(targets).__name__
        raise TypeError(f"targets must be a tensor of class indices, but got {found}; call torch.as_tensor(targets).")
    if targets.ndim != 1 or len(targets) == 0:
        raise ValueError(
            f"targets must have the shape [samples], at least one, but it is {list(targets.shape)}; "
            "turn one-hot rows into class indices with targets.argmax(1)."
        )
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets must be an integer tensor of class indices, but got {targets.dtype}; call .long().")
    smallest, largest = int(targets.min()), int(targets.max())
    if smallest < 0 or largest >= (largest + 1 if num_classes is None else num_classes):
        bounds = "0 or more" if num_classes is None else f"from 0 to {num_classes - 1}"
        more = "" if num_classes is None else f", or pass num_classes={max(largest + 1, 1)}"
        raise ValueError(
            f"targets must hold class indices {bounds}, but they range from {smallest} to {largest}; drop unlabelled "
            f"samples{more}."
        )
