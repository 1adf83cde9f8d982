"""The results of ``timm-csg evaluate`` as tables for people: the numbers, and how maps were judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from timm_csg.cli.display import intervals, verdicts
from timm_csg.measuring.measures import MOST_RATED
from timm_csg.numbers import LABELS_GIVEN, NUMBERS, Number, notes

_ATTACK_LINES: tuple[tuple[str, str, Literal["high", "low"]], ...] = (
    ("accuracy", "accuracy", "high"),
    ("random forest", "  missed by random forest", "low"),
    ("logistic regression", "  missed by logistic regression", "low"),
    ("disagreement_error", "  missed by comparing the paths", "low"),
)

_JUDGES = {
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


class _Line(NamedTuple):
    """A line of the table with the value of every model."""

    number: Number
    values: list[float | None]


def comparison(results: dict[str, Any], width: int) -> Group:
    """Metrics down, models across; in several tables where they are too many for the width.

    Args:
        results: What ``evaluate`` returns.
        width: Of the terminal.

    Returns:
        What to print.
    """
    models = results["checkpoints"]
    lines = [line for line in _lines(results) if any(value is not None for value in line.values)]
    columns = {
        name: [_cell(line, index, model) for line in lines] for index, (name, model) in enumerate(models.items())
    }
    first = max((len(line.number.label) for line in lines), default=0) + 2
    blocks: list[dict[str, list[Text]]] = [{}]
    left = width - first
    for name, cells in columns.items():
        needed = max([min(len(name), 14), *(cell.cell_len for cell in cells)]) + 2
        if blocks[-1] and left < needed:
            blocks.append({})
            left = width - first
        left -= needed
        blocks[-1][name] = cells
    data = f"{results['images']:,} images of {results['data']} ({results['split']})"
    title = Text(f"{data}, {len(results['classes']):,} classes", style="bold")
    return Group(title, *(_table(lines, block) for block in blocks), _notes(results))


def _lines(results: dict[str, Any]) -> Iterator[_Line]:
    models = results["checkpoints"].values()
    for group in results["metrics"]:
        for number in (number for number in NUMBERS if number.group == group and number.label):
            yield _Line(number, [model.get(number.key) for model in models])
            key = f"{number.key}_interval"
            halves = [None if (ends := model.get(key)) is None else (ends[1] - ends[0]) / 2 for model in models]
            yield _Line(Number(key, group, "  ± half of its interval", number.places), halves)
    attacks = dict.fromkeys(name for model in models for name in model.get("adversarial") or ())
    for attack in attacks:
        found = [(model.get("adversarial") or {}).get(attack) or {} for model in models]
        found = [one | (one.get("detection_errors") or {}) for one in found]
        for key, label, best in _ATTACK_LINES:
            number = Number(key, attack, label.replace("accuracy", f"accuracy, {attack}"), 3, best)
            yield _Line(number, [one.get(key) for one in found])


def _table(lines: Sequence[_Line], columns: dict[str, list[Text]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold", max_width=max(14, *map(len, columns[name])))
    for index, line in enumerate(lines):
        if index and line.number.group != lines[index - 1].number.group:
            table.add_row()
        table.add_row(Text(line.number.label), *(cells[index] for cells in columns.values()))
    return table


def _cell(line: _Line, index: int, model: dict[str, Any]) -> Text:
    """A number, after a mark if it is the best of several or was given labels; the marks stand left, digits align."""
    number, value = line.number, line.values[index]
    if value is None:
        return Text("–", style="dim")
    text = f"{value:.{number.places}f}"
    if number.key == "gated_accuracy" and model.get("gated_accuracy_uses_labels"):
        return Text(f"†{text}")
    known = {f"{other:.{number.places}f}" for other in line.values if other is not None}
    best = max if number.best == "high" else min
    is_best = number.best is not None and len(known) > 1 and text == best(known, key=float)
    return Text(f"*{text}", style="bold") if is_best else Text(text)


def _notes(results: dict[str, Any]) -> Text | Group:
    models = results["checkpoints"].values()
    rated = intervals(results["checkpoints"], results["classes"]) if len(results["classes"]) <= MOST_RATED else []
    judged = Text("\n".join([*rated, *verdicts(results["checkpoints"])]))
    bound = max((model.get("mutual_information_bound") or 0.0 for model in models), default=0.0)
    facts = {"mutual_information_bound": bound, "least_density": 1 / max(1, len(results["classes"]))}
    keys = [number.key for number in NUMBERS if number.group in results["metrics"]]
    said = notes({key for key in keys if any(model.get(key) is not None for model in models)}, facts)
    if len(models) > 1:
        said.insert(0, "* the best of these models.")
    if any(model.get("gated_accuracy_uses_labels") for model in models):
        said.append(f"† {LABELS_GIVEN}")
    told = Text("\n".join(said), style="dim")
    return Group(judged, told) if judged else told


def explanations_table(results: dict[str, Any]) -> Table | None:
    """Scores of all maps of all models, behind them what chance has; None if no map was judged."""
    found = {label: model.get("explanations") or {} for label, model in results["checkpoints"].items()}
    asked = {judge for maps in found.values() for answers in maps.values() for judge in answers}
    if not asked:
        return None
    judges = [judge for judge in _JUDGES if judge in asked]
    table = Table("model", "map", *(_JUDGES[judge] for judge in judges), title="explanation maps (chance in brackets)")
    for label, maps in found.items():
        for name, answers in maps.items():
            table.add_row(label, name, *(_score(answers.get(judge)) for judge in judges))
    return table


def _score(answer: dict[str, float] | None) -> str:
    return "–" if answer is None else f"{answer['score']:.2f} ({answer['chance']:.2f})"
