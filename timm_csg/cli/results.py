"""What was measured, as files: JSON, tables by class and filter, figures; and what is measured after a training."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from timm_csg.checkpoint import replacing
from timm_csg.cli.data import Data
from timm_csg.cli.engine import Training
from timm_csg.cli.spelling import file_stem
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
    """The gate and the mutual information as pictures, if matplotlib is there and they were measured."""
    subject, stem = found.subject, file_stem(name)
    if "mutual_information_score" in found.numbers:
        path = figures / f"mutual_information_{stem}.png"
        save_matrix_figure(path, subject.mutual, class_names, "mutual information (nats)", title)
    if subject.gate is not None and "filters_per_class" in found.numbers:
        save_matrix_figure(figures / f"gate_{stem}.png", subject.gate, class_names, "gate", title)


def write_tables(found: Measurement, class_names: list[str], label: str, output: Path) -> None:
    """Tables by class and by filter, and the figures.

    Args:
        found: What was measured.
        class_names: One for each class.
        label: Name of the model.
        output: Folder, made if it does not exist.
    """
    stem = file_stem(label)
    _write_table(output / f"classes_{stem}.csv", {"class": class_names, **found.classes}, class_names)
    filters = {"filter": torch.arange(found.subject.seen.features.shape[1], device="cpu"), **found.filters}
    _write_table(output / f"filters_{stem}.csv", filters, class_names)
    write_figures(found, class_names, label, label, output / "figures")


def write_matrices(found: Measurement, class_names: list[str], label: str, output: Path) -> None:
    """The gate and the mutual information (nats) as CSV files: one line for each class, one column for each filter.

    Args:
        found: What was measured.
        class_names: One for each class.
        label: Name of the model.
        output: Folder, made if it does not exist.
    """
    for name, matrix in (("gate", found.subject.gate), ("mutual_information", found.subject.mutual)):
        if matrix is not None:
            columns = {f"filter {index}": column for index, column in enumerate(matrix.unbind(dim=1))}
            _write_table(output / f"{name}_{file_stem(label)}.csv", {"class": class_names, **columns}, class_names)


def save_matrix_figure(path: Path, matrix: torch.Tensor, class_names: list[str], label: str, title: str) -> None:
    """Write the picture of a class-filter matrix, whole or not at all; without matplotlib say so in the log."""
    from timm_csg.plots import class_filter_figure

    try:
        figure = class_filter_figure(matrix, class_names, title=title, label=label)
    except ImportError as error:
        _logger.warning("no figures: %s", error)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write_log(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the epochs of all trainings as one CSV file, whole or not at all."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
