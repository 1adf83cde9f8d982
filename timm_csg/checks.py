"""Checks of what callers pass: numbers of any type become plain ones, wrong names come with the nearest right one."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any


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


def nearest(name: Any, names: Iterable[str]) -> str:
    """A question to put behind an error about a misspelt name, with a space before it; empty where none is near.

    Example:
        >>> nearest("sparsty_weight", ["gated_weight", "sparsity_weight"]), nearest("x", ["gate"])
        (" Did you mean 'sparsity_weight'?", '')
    """
    found = get_close_matches(name, list(names), n=1) if isinstance(name, str) else []
    return f" Did you mean {found[0]!r}?" if found else ""
