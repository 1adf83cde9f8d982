"""How results that hold tensors show themselves: a ``repr`` of one line, a small table in notebooks, data frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeVar

from torch import Tensor

from timm_csg.metrics.frames import AXES, to_dataframe

_MOST_ENTRIES = 8
_CELL = 'style="text-align: left; vertical-align: top"'
Result = TypeVar("Result")


def in_one_line(result: type[Result]) -> type[Result]:
    """Give a named tuple or a dataclass a short ``repr``, the same as a table for notebooks, and ``to_dataframe``.

    Example:
        >>> from timm_csg.metrics import Ablation
        >>> import torch
        >>> Ablation(torch.ones(2), torch.zeros(20, 20))
        Ablation(before=tensor([1., 1.]), after=<float32 [20, 20]>)
    """
    result.__repr__ = _one_line  # type: ignore[method-assign]
    result._repr_html_ = _as_table  # type: ignore[attr-defined]
    if result.__name__ in AXES:
        result.to_dataframe = to_dataframe  # type: ignore[attr-defined]
    return result


def _entries(result: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(result)] if dataclasses.is_dataclass(result) else result._fields
    return {name: getattr(result, name) for name in names}


def _one_line(result: Any) -> str:
    parts = ", ".join(f"{name}={short(value)}" for name, value in _entries(result).items())
    return f"{type(result).__name__}({parts})"


def _as_table(result: Any) -> str:
    rows = [{"": name, "value": short(value)} for name, value in _entries(result).items()]
    return html_table(rows, type(result).__name__)


def html_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """A plain table for a notebook, which styles it; all text is escaped.

    Args:
        rows: Cells by the heads of the columns; all rows have the same.
        title: Above the table.

    Example:
        >>> html_table([{"a": "<"}]).replace(_CELL, "")
        '<table><thead><tr><th >a</th></tr></thead><tbody><tr><td >&lt;</td></tr></tbody></table>'
    """
    caption = f"<caption {_CELL}><b>{escape(title)}</b></caption>" if title else ""
    heads = "".join(f"<th {_CELL}>{escape(name)}</th>" for name in (rows[0] if rows else ()))
    body = "".join(
        f"<tr>{''.join(f'<td {_CELL}>{escape(str(cell))}</td>' for cell in row.values())}</tr>" for row in rows
    )
    return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def short(value: Any) -> str:
    """A value in a few words.

    Example:
        >>> short(0.123456), short(list(range(100))), short({"a": None})
        ('0.1235', '<100 items>', "{'a': None}")
    """
    if isinstance(value, Tensor) and value.numel() > _MOST_ENTRIES:
        return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}>"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | dict) and len(value) > _MOST_ENTRIES:
        return f"<{len(value)} items>"
    return repr(value)
