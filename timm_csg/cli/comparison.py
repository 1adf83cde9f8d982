"""The results of ``timm-csg evaluate`` as a table for people, and as files: tables by class and filter, figures."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from timm_csg.checkpoint import replacing
from timm_csg.cli.display import verdicts
from timm_csg.cli.groups import GROUPS, Row
from timm_csg.cli.measures import Subject
from timm_csg.cli.results import save_matrix_figure
from timm_csg.cli.spelling import file_stem

_LABELS = "† the label gate is given the true label: this says nothing about new images."
_ATTACK_LINES = (
    ("accuracy", "accuracy", max),
    ("random forest", "  missed by random forest", min),
    ("logistic regression", "  missed by logistic regression", min),
    ("disagreement_error", "  missed by comparing the paths", min),
)


class _Line(NamedTuple):
    """A line of the table with the value of every model."""

    group: str
    row: Row
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
    first = max((len(line.row.label) for line in lines), default=0) + 2
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
        for row in GROUPS[group].rows:
            yield _Line(group, row, [model.get(row.key) for model in models])
            intervals = [model.get(f"{row.key}_interval") for model in models]
            if any(intervals):
                halves = [None if ends is None else (ends[1] - ends[0]) / 2 for ends in intervals]
                yield _Line(group, Row("", "  ± half of its interval", row.places), halves)
    attacks = dict.fromkeys(name for model in models for name in model.get("adversarial") or ())
    for attack in attacks:
        found = [(model.get("adversarial") or {}).get(attack) or {} for model in models]
        found = [one | (one.get("detection_errors") or {}) for one in found]
        for key, label, best in _ATTACK_LINES:
            row = Row(key, label.replace("accuracy", f"accuracy, {attack}"), 3, best)
            yield _Line(attack, row, [one.get(key) for one in found])


def _table(lines: Sequence[_Line], columns: dict[str, list[Text]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold", max_width=max(14, *map(len, columns[name])))
    for index, line in enumerate(lines):
        if index and line.group != lines[index - 1].group:
            table.add_row()
        table.add_row(Text(line.row.label), *(cells[index] for cells in columns.values()))
    return table


def _cell(line: _Line, index: int, model: dict[str, Any]) -> Text:
    """A number, after a mark if it is the best of several or was given labels; the marks stand left, digits align."""
    row, value = line.row, line.values[index]
    if value is None:
        return Text("–", style="dim")
    text = f"{value:.{row.places}f}"
    if row.key == "gated_accuracy" and model.get("gated_accuracy_uses_labels"):
        return Text(f"†{text}")
    known = [round(other, row.places) for other in line.values if other is not None]
    differ = row.best is not None and len(set(known)) > 1
    is_best = differ and row.best is not None and round(value, row.places) == row.best(known)
    return Text(f"*{text}", style="bold") if is_best else Text(text)


def _notes(results: dict[str, Any]) -> Text | Group:
    models = results["checkpoints"].values()
    judged = Text("\n".join(verdicts(results["checkpoints"])))
    facts = {
        "bound": max((model.get("mutual_information_bound") or 0.0 for model in models), default=0.0),
        "least": 1 / max(1, len(results["classes"])),
    }
    notes = [GROUPS[name].note.format(**facts) for name in results["metrics"] if GROUPS[name].note]
    if len(models) > 1:
        notes.insert(0, "* the best of these models.")
    if any(model.get("gated_accuracy_uses_labels") for model in models):
        notes.append(_LABELS)
    return Group(judged, Text("\n".join(notes), style="dim")) if judged else Text("\n".join(notes), style="dim")


def write_subject(subject: Subject, label: str, output: Path) -> None:
    """Tables by class and by filter, and figures if matplotlib is there.

    Args:
        subject: After it was measured.
        label: Its name.
        output: Folder, made if it does not exist.
    """
    stem = file_stem(label)
    names = subject.class_names
    _write_table(output / f"classes_{stem}.csv", {"class": names, **subject.classes}, names)
    filters = {"filter": torch.arange(subject.seen.features.shape[1]), **subject.filters}
    _write_table(output / f"filters_{stem}.csv", filters, names)
    matrix = subject.matrix
    if "mutual_information" in subject.classes:
        path = output / "figures" / f"mutual_information_{stem}.png"
        save_matrix_figure(path, subject.mutual, names, "mutual information (nats)", label)
    if matrix is not None and "owner" in subject.filters:
        save_matrix_figure(output / "figures" / f"gate_{stem}.png", matrix, names, "gate", label)


def _write_table(path: Path, columns: dict[str, Any], class_names: Sequence[str]) -> None:
    """Columns of equal length; class indices are written as names, NaN as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {name: column if isinstance(column, list) else column.tolist() for name, column in columns.items()}
    for name in ("owner", "told_class"):
        if name in lists:
            lists[name] = [class_names[index] if index >= 0 else "" for index in lists[name]]  # nobody's: -1
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(lists)
        writer.writerows([_cell_text(value) for value in row] for row in zip(*lists.values(), strict=True))


def _cell_text(value: Any) -> str:
    """A number, or a name that no spreadsheet takes for a formula."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
