"""The maps that ``timm-csg evaluate --explanations`` judged, as a table for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_LABELS = {
    "grid_2x2": "grid 2x2",
    "grid_3x3": "grid 3x3",
    "deletion": "deletion ↓",
    "insertion": "insertion",
    "pointing_game": "pointing",
    "energy_inside": "energy",
    "plausibility": "plausible",
    "stability": "stable",
    "weight_randomisation": "weights ↓",
    "random_logit": "class ↓",
}


def explanations_table(results: dict[str, Any]) -> Table | None:
    """Scores of all maps of all models, behind them what chance has; None if no map was judged."""
    found = {label: model.get("explanations") or {} for label, model in results["checkpoints"].items()}
    asked = {judge for maps in found.values() for answers in maps.values() for judge in answers}
    if not asked:
        return None
    judges = [judge for judge in _LABELS if judge in asked]
    table = Table("model", "map", *(_LABELS[judge] for judge in judges), title="explanation maps (chance in brackets)")
    for label, maps in found.items():
        for name, answers in maps.items():
            table.add_row(label, name, *(_cell(answers.get(judge)) for judge in judges))
    return table


def _cell(answer: dict[str, float] | None) -> str:
    return "–" if answer is None else f"{answer['score']:.2f} ({answer['chance']:.2f})"
