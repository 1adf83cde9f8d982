"""What all figures share: notebooks show them without pyplot, and names in them are taken as they are."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AS_IT_IS: dict[str, Any] = {"parse_math": False}  # "$" and "%" in names are no mathematics


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


def drawable(text: str, most: int = 90) -> str:
    """Text that a font can draw (no half characters, as in names of files that are not UTF-8), cut to a length.

    Example:
        >>> drawable("caf" + chr(0xDCE9)), drawable("abcdef", 4)
        ('caf?', 'abc…')
    """
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= most else text[: most - 1] + "…"


def check_pictures(pictures: Tensor, what: str) -> None:
    """Refuse what is not [images, 1 or 3, height, width]."""
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ValueError(
            f"{what} must be pictures [images, 1 or 3, height, width], but has shape {list(pictures.shape)}."
        )


def draw_grey(axes: Any, picture: Tensor) -> None:
    """A picture [channels, height, width] in grey, for what is to be drawn over it."""
    axes.imshow(picture.detach().float().clamp(0, 1).cpu().mean(dim=0), cmap="gray", vmin=0, vmax=1)
