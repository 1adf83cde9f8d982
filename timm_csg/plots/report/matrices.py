"""The page with gate and mutual information: pictures that can be sorted, and tables."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from timm_csg.plots.matrix import filter_order
from timm_csg.plots.report.book import Book
from timm_csg.plots.report.pictures import matrix_picture
from timm_csg.plots.report.templates import Markup, element, fill, join, render
from timm_csg.plots.report.tiles import classes_left_out, filters_left_out

_MOST_TABLE_CELLS = 30_000
_ACCENT = (68, 83, 199)


def matrix_page(book: Book) -> Markup:
    """Gate and mutual information as pictures that can be sorted, and as tables."""
    findings = book.findings
    parts = []
    if findings.gate is not None:
        text = "What training decided: 1 where a filter works for a class, 0 where it does not."
        parts.append(_matrix(book, "gate", findings.gate_name.capitalize(), text, findings.gate, 1.0, 2))
        lead_text = (
            "The first picture is what the filters were trained for, the second what they were measured to know."
        )
    else:
        lead_text = "This model has no gate, so there is one picture: what the filters were measured to know."
    text = (
        "What was measured: how much the response of a filter tells whether an image belongs to a class, in nats; "
        f"{findings.numbers.mutual_information_bound:.3f} is the most that is possible."
    )
    parts.append(_matrix(book, "mutual", "Mutual information", text, findings.mutual, _top(findings.mutual), 3))
    left_out = Markup(classes_left_out(book) + filters_left_out(book))
    return render("matrix-page", lead=lead_text, matrices=join(parts), left_out=left_out)


def _top(matrix: Tensor) -> float:
    return max(float(matrix.max()), 1e-9)


def _matrix(book: Book, key: str, name: str, text: str, matrix: Tensor, maximum: float, places: int) -> Markup:
    shown = matrix[book.classes][:, book.filters]
    table = Markup("")
    if shown.numel() <= _MOST_TABLE_CELLS:
        head = join(element("th", book.names[label], 'scope="col" class="num"') for label in book.classes)
        rows = []
        for index, values in zip(book.filters, shown.T.tolist(), strict=True):
            row = "".join(f"<td>{value:.{places}f}" for value in values)
            rows.append(Markup(f'<tr><th scope="row"><a href="#filter-{index}">{index}</a></th>{row}</tr>'))
        table = render("matrix-table", name=name, head=head, rows=join(rows, "\n"))
    order = filter_order(shown)
    return render(
        "matrix",
        key=key,
        name=name,
        text=text,
        classes=len(book.classes),
        filters=len(book.filters),
        options=join(
            Markup(f'<option value="{place}">{fill("by {name}", name=book.names[label])}</option>')
            for place, label in enumerate(book.classes)
        ),
        picture=Markup(matrix_picture(shown[:, order] / maximum, _ACCENT)),
        alt=f"{name}: {len(book.classes)} classes down, {len(book.filters)} filters across, sorted by owner.",
        maximum=f"{maximum:.{places}f}",
        table=table,
    )


def data(book: Book) -> Markup:
    """What the script needs of the matrices, as JSON that cannot end its element."""
    findings = book.findings
    matrices: dict[str, Any] = {}
    for key, matrix, scale, unit in (
        ("gate", findings.gate, 1000, findings.gate_name),
        ("mutual", findings.mutual, 10_000, "nats"),
    ):
        if matrix is not None:
            shown = (matrix[book.classes][:, book.filters].double() * scale).round().long().tolist()
            top = 1.0 if key == "gate" else _top(matrix)
            matrices[key] = {"values": shown, "scale": scale, "top": round(top * scale), "unit": unit}
    values = {
        "classes": [
            {"id": label, "name": book.names[label], "own": len(findings.filters_of(label))} for label in book.classes
        ],
        "filters": [{"id": index, "owner": book.names[int(findings.owners[index])]} for index in book.filters],
        "matrices": matrices,
    }
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
