"""The page of matrices: what its templates and its script need of the gate and of the mutual information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from timm_csg.plots.reporting.book import Book
from timm_csg.plots.reporting.pictures import matrix_picture

_MOST_TABLE_CELLS = 30_000
_ACCENT = (68, 83, 199)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as it is shown.

    Attributes:
        key: ``"gate"`` or ``"mutual"``.
        unit: Of its values, for the script.
        values: Of the classes and filters with a page [classes, filters].
        maximum: End of the colour scale.
        places: Decimal places.
        picture: Address of a picture for readers without scripts.
    """

    key: str
    unit: str
    values: Tensor
    maximum: float
    places: int
    picture: str

    @property
    def table(self) -> list[list[float]] | None:
        """The values by filter; None if they are too many for a table."""
        return self.values.T.tolist() if self.values.numel() <= _MOST_TABLE_CELLS else None


def shown_matrices(book: Book) -> list[Matrix]:
    """The gate, where there is one, and the mutual information."""
    findings, columns = book.findings, _columns(book)
    found = []
    for key, matrix, unit, maximum, places in (
        ("gate", findings.gate, findings.gate_name, 1.0, 2),
        ("mutual", findings.mutual, "nats", max(float(findings.mutual.max()), 1e-9), 3),
    ):
        if matrix is not None:
            shown = matrix[book.classes][:, book.filters]
            picture = matrix_picture(shown[:, columns] / maximum, _ACCENT)
            found.append(Matrix(key, unit, shown, maximum, places, picture))
    return found


def _columns(book: Book) -> list[int]:
    """Places of the shown filters, those of a class together: the same order in every matrix."""
    place = {index: column for column, index in enumerate(book.filters)}
    return [place[index] for index in book.findings.order.tolist() if index in place]


def script_data(book: Book) -> dict[str, Any]:
    """What the script needs of the matrices, fit for JSON."""
    findings = book.findings
    return {
        "classes": [
            {"id": label, "name": book.names[label], "own": len(findings.filters_of(label))} for label in book.classes
        ],
        "filters": [
            {
                "id": index,
                "owner": book.owner(index),
                "row": book.classes.index(owner) if owner in book.classes else None,
            }
            for index, owner in zip(book.filters, findings.owners[book.filters].tolist(), strict=True)
        ],
        "order": _columns(book),
        "matrices": {
            matrix.key: {
                "values": (matrix.values.double() * 10_000).round().div(10_000).tolist(),
                "top": matrix.maximum,
                "unit": matrix.unit,
                "places": matrix.places,
            }
            for matrix in shown_matrices(book)
        },
    }
