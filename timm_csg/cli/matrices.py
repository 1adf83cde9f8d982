"""Gate and mutual information of every class and filter as CSV files, for spreadsheets, R and pandas."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from timm_csg.checkpoint import replacing


def write_matrices(
    matrices: Mapping[str, Tensor | None], class_names: Sequence[str], label: str, folder: Path
) -> list[Path]:
    """Write matrices, each as ``<name>_<label>.csv``: one line for each class, one column for each filter.

    Args:
        matrices: By name [classes, filters], such as ``{"gate": ..., "mutual_information": ...}``; None is left out.
        class_names: One for each class; they become the first column.
        label: Name of the model, fit for a file's name.
        folder: Where to; made if it does not exist.

    Returns:
        The files.

    Raises:
        ValueError: If there is not one name for each class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, matrix in matrices.items():
        if matrix is None:
            continue
        if len(class_names) != len(matrix):
            raise ValueError(f"{name} has {len(matrix)} classes, but there are {len(class_names)} names.")
        files.append(folder / f"{name}_{label}.csv")
        with replacing(files[-1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["class", *(f"filter {index}" for index in range(matrix.shape[1]))])
            for class_name, row in zip(class_names, matrix.tolist(), strict=True):
                writer.writerow([_as_text(class_name), *(f"{value:.6g}" for value in row)])
    return files


def _as_text(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
