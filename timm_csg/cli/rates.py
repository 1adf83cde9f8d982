"""Accuracies with the interval that few images leave open, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def intervals(results: Mapping[str, Mapping[str, Any]], class_names: Sequence[str] | None = None) -> list[str]:
    """A line for each model: its accuracy with an interval; for two and three classes sensitivity and specificity.

    Args:
        results: Numbers by model, as ``metrics.json`` has them.
        class_names: Names of the classes; None: those in the results, or numbers.

    Returns:
        The lines; none for a model whose accuracy was not measured.

    Example:
        >>> intervals({"one": {"accuracy": 0.5, "accuracy_interval": [0.2, 0.8]}})
        ['one: accuracy 0.500 (95 % interval 0.200 to 0.800)']
    """
    lines = []
    for name, found in results.items():
        ends = found.get("accuracy_interval")
        if ends is None:
            continue
        parts = [f"{name}: accuracy {found['accuracy']:.3f} (95 % interval {ends[0]:.3f} to {ends[1]:.3f})"]
        for rate in ("sensitivity", "specificity"):
            rows = found.get(rate)
            if rows:
                names = class_names or found.get("class_names") or list(map(str, range(len(rows))))
                told = [f"{label} {_share(*row)}" for label, row in zip(names, rows, strict=True) if row is not None]
                parts.append(f"{rate}: {', '.join(told)}")
        lines.append("; ".join(parts))
    return lines


def _share(share: float, low: float, high: float) -> str:
    return f"{share:.3f} ({low:.3f} to {high:.3f})"
