"""Figures that a notebook shows when they are the value of a cell, without pyplot."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> Figure:
    """A matplotlib figure that is not registered with pyplot and shows itself in notebooks.

    Args:
        **options: Of ``matplotlib.figure.Figure``.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing; the message names the extra.
    """
    figure: Figure = _notebook_figure()(**options)
    return figure


@functools.cache
def _notebook_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'timm_csg[plots]'.") from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure
