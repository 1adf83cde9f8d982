"""A sheet of pictures and heat maps: one row for each image, one column for each thing shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from timm_csg.plots._figure import AS_IT_IS, check_pictures, draw_grey, drawable, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def map_figure(columns: Mapping[str, Tensor | tuple[Tensor, Tensor]], *, title: str = "", size: float = 1.1) -> Figure:
    """Draw pictures, and pictures with heat maps over them, side by side.

    Every map is scaled by its own largest value, so colours compare positions within one picture and not pictures with
    each other. A map without a positive value is marked "empty" instead of painted.

    Args:
        columns: By name, from left to right: pictures [images, channels, height, width] with 1 or 3 channels and values
            in [0, 1], or a pair of such pictures and maps [images, height, width].
        title: Above the sheet.
        size: Edge of a picture in inches.

    Returns:
        A matplotlib figure, not registered with pyplot and shown by notebooks.

    Raises:
        ImportError: If matplotlib is missing; the message names the extra.
        TypeError: If the columns are no dictionary.
        ValueError: If the columns differ in their number of images, or a map in size from its picture.
    """
    rows = _checked(columns)
    figure = new_figure(figsize=(size * len(columns), size * rows + 0.4 + 0.3 * bool(title)), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for at, (name, value) in enumerate(columns.items()):
        pictures, maps = value if isinstance(value, tuple) else (value, None)
        grid[0, at].set_title(drawable(name, 40), fontsize=8, **AS_IT_IS)
        for row in range(rows):
            axes = grid[row, at]
            axes.set_axis_off()
            if maps is None:
                channels = pictures[row].detach().float().clamp(0, 1).cpu()
                axes.imshow(channels.expand(3, -1, -1).permute(1, 2, 0))
                continue
            draw_grey(axes, pictures[row])
            heat, peak = maps[row].detach().float().cpu(), float(maps[row].max())
            if peak > 0:
                axes.imshow(heat / peak, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
            else:
                axes.text(
                    0.5, 0.5, "empty", ha="center", va="center", fontsize=7, color="red", transform=axes.transAxes
                )
    if title:
        figure.suptitle(drawable(title), fontsize=9, **AS_IT_IS)
    return figure


def _checked(columns: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> int:
    """The number of rows."""
    if not isinstance(columns, Mapping):
        raise TypeError(
            f"columns must be a dictionary from headings to pictures or (pictures, maps), but are "
            f"{type(columns).__name__}: map_figure({{'picture': images, 'Grad-CAM': (images, maps)}})."
        )
    rows = set()
    for name, value in columns.items():
        pictures, maps = value if isinstance(value, tuple) else (value, None)
        check_pictures(pictures, repr(name))
        if maps is not None and maps.shape != (len(pictures), *pictures.shape[2:]):
            raise ValueError(
                f"the maps of {name!r} must be {[len(pictures), *pictures.shape[2:]]}, but are {list(maps.shape)}; "
                "create them with upsample=True."
            )
        rows.add(len(pictures))
    if len(rows) != 1:
        raise ValueError(f"all columns must have the same number of images, but have {sorted(rows)}.")
    return rows.pop()
