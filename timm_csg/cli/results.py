"""What was measured, as files: JSON, tables by class and filter, figures; and what is measured after a training."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm_csg.checkpoint import replacing
from timm_csg.cli.data import Data
from timm_csg.cli.engine import Training
from timm_csg.cli.runs import file_stem
from timm_csg.measuring import Measurement, measure
from timm_csg.measuring.measures import MOST_RATED
from timm_csg.numbers import SUMMARY

_logger = logging.getLogger(__name__)


def measure_training(training: Training, data: Data, standard_accuracy: float | None = None) -> Measurement:
    """What is measured of a model at the end of its training, on the validation images.

    Args:
        training: At its end.
        data: Its data.
        standard_accuracy: Of standard training in the same run, for the verdict; None: not known.

    Returns:
        The numbers that its table, the model card and ``metrics.json`` show, and how the model was trained.
    """
    settings = training.settings
    found = measure(
        training.eval_model,
        data.validation,
        SUMMARY,
        num_classes=data.num_classes,
        amp_dtype=training.amp_dtype,
        standard_accuracy=standard_accuracy,
    )
    about = {
        "recipe": training.name,
        "data": settings.data_name,
        "model": settings.model_name,
        "seed": settings.seed,
        "epochs": len(training.history),
        "class_names": data.class_names if data.num_classes <= MOST_RATED else None,
    }
    seconds = round(sum(row["seconds"] for row in training.history), 1)
    return replace(found, numbers=about | found.numbers | {"seconds": seconds})


def write_figures(found: Measurement, class_names: list[str], name: str, title: str, figures: Path) -> None:
    """The gate and the mutual information as pictures, if they were measured; without matplotlib the log says so."""
    from timm_csg.plots import class_filter_figure

    kinds = (
        ("mutual_information_score", "mutual", "mutual_information", "mutual information (nats)"),
        ("filters_per_class", "gate", "gate", "gate"),
    )
    for number, attribute, file, label in kinds:
        matrix = getattr(found.subject, attribute) if number in found.numbers else None
        if matrix is None:
            continue
        try:
            figure = class_filter_figure(matrix, class_names, title=title, label=label)
        except ImportError as error:
            _logger.warning("no figures: %s", error)
            return
        figures.mkdir(parents=True, exist_ok=True)
        with replacing(figures / f"{file}_{file_stem(name)}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def write_tables(
    found: Measurement, class_names: list[str], label: str, output: Path, *, matrices: bool = False
) -> None:
    """CSV tables by class and by filter, and the figures.

    Args:
        found: What was measured.
        class_names: One for each class.
        label: Name of the model.
        output: Folder, made if it does not exist.
        matrices: Whether to write the whole gate and mutual information (nats), too: one line for each class, one
            column for each filter.
    """
    subject = found.subject
    tables: dict[str, dict[str, Any]] = {
        "classes": {"class": class_names, **found.classes},
        "filters": {"filter": list(range(subject.seen.features.shape[1])), **found.filters},
    }
    for name, matrix in (("gate", subject.gate), ("mutual_information", subject.mutual)) if matrices else ():
        if matrix is not None:
            columns = {f"filter {index}": column for index, column in enumerate(matrix.unbind(dim=1))}
            tables[name] = {"class": class_names, **columns}
    for name, columns in tables.items():
        _write_table(output / f"{name}_{file_stem(label)}.csv", columns, class_names)
    write_figures(found, class_names, label, label, output / "figures")


def write_log(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the epochs of all trainings as one CSV file, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    _write_csv(path, names, ([row.get(name, "") for name in names] for row in rows))


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_table(path: Path, columns: dict[str, Any], class_names: Sequence[str]) -> None:
    """Columns of equal length; class indices are written as names, NaN as nothing."""
    lists = {name: column if isinstance(column, list) else column.tolist() for name, column in columns.items()}
    for name in ("owner", "told_class"):
        if name in lists:
            lists[name] = [class_names[index] if index >= 0 else "" for index in lists[name]]  # nobody's: -1
    _write_csv(path, lists, ([_cell_text(value) for value in row] for row in zip(*lists.values(), strict=True)))


def _write_csv(path: Path, names: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([names, *rows])


def _cell_text(value: Any) -> str:
    """A number, or a name that no spreadsheet takes for a formula."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
