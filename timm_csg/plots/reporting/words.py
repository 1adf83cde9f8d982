"""The summary in plain words: what each number means, where it lies between worst and best, and what is good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from timm_csg.numbers import NUMBERS


class Measure(NamedTuple):
    """One number of the summary.

    Attributes:
        name: A few words.
        value: As shown.
        place: Where it lies on the gauge, 0 to 1.
        meaning: One sentence.
        good: What a good value is.
    """

    name: str
    value: str
    place: float
    meaning: str
    good: str


def percent(share: float) -> str:
    """A share in words.

    Example:
        >>> percent(0.98765)
        '98.8%'
    """
    return f"{100 * share:.1f}%"


def on_scale(share: float, end: float = 100) -> str:
    """A share as a place on a drawn scale; outside of 0 to 1 it lies at an end.

    Example:
        >>> on_scale(0.5), on_scale(7, end=98.8)
        ('50.0', '98.8')
    """
    return f"{end * max(0.0, min(1.0, share)):.1f}"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun.

    Example:
        >>> count(1, "filter"), count(2, "class", "classes")
        ('1 filter', '2 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def measures(numbers: Mapping[str, Any]) -> dict[str, Measure]:
    """The numbers that apply to a model, by key.

    Args:
        numbers: ``Findings.numbers`` of one model.
    """
    found = {}
    for number in NUMBERS:
        value, gauge = numbers.get(number.key), number.gauge
        if gauge is not None and value is not None:
            whole = numbers[gauge.whole] if gauge.whole else 1.0
            share = value / whole if whole > 0 else 0.0
            shown = gauge.shown.format_map(numbers) if gauge.shown else percent(share)
            texts = (text.format_map(numbers) for text in (gauge.meaning, gauge.good))
            found[number.key] = Measure(gauge.name, shown, min(1.0, share), *texts)
    return found
