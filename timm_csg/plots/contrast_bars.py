"""Why one class rather than another, drawn: the filters that decide over the picture, and what each adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from timm_csg.explain.two_classes import Contrast
from timm_csg.plots._figure import AS_IT_IS, check_pictures, draw_grey, drawable, new_figure
from timm_csg.plots.colours import filter_colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contrast_figure(
    pictures: Tensor, contrast: Contrast, *, names: Sequence[str] | None = None, size: float = 2.2
) -> Figure:
    """Draw what decides between two classes: where its filters respond, each in its own colour, and bars in logits.

    Every filter has one colour in all figures (``filter_colour``). Over the picture, a filter is the stronger the more
    it adds there, for either class, by one scale for the picture. Bars to the right speak for the first class, bars to
    the left for the second. Below are all other filters together, and what no filter adds.

    Args:
        pictures: [images, channels, height, width] with 1 or 3 channels and values in [0, 1].
        contrast: What ``explain.contrast`` found for them.
        names: Of all classes; None: their indices.
        size: Height of a row in inches.

    Returns:
        A matplotlib figure, not registered with pyplot and shown by notebooks.

    Raises:
        ImportError: If matplotlib is missing; the message names the extra.
        ValueError: If there is not one picture for each image of the contrast, or maps have another size.
    """
    count = len(contrast.difference)
    check_pictures(pictures, "pictures")
    if len(pictures) != count:
        raise ValueError(f"the contrast is of {count} images, but there are {len(pictures)} pictures; pass the same.")
    if contrast.maps is not None and contrast.maps.shape[2:] != pictures.shape[2:]:
        raise ValueError("the maps must have the size of the pictures; make the contrast with upsample=True.")
    one, other = (str(index) if names is None else names[index] for index in contrast.classes)
    figure = new_figure(figsize=(size * 3.4, size * count), layout="constrained")
    grid = figure.subplots(count, 2, squeeze=False, width_ratios=[1, 2.2])
    for row in range(count):
        _draw_picture(grid[row, 0], pictures[row], contrast, row)
        _draw_bars(grid[row, 1], contrast, row)
        title = f"{one} rather than {other}: {float(contrast.difference[row]):+.2f}"
        grid[row, 1].set_title(drawable(title, 60), fontsize=8, **AS_IT_IS)
    return figure


def _draw_picture(axes: Any, picture: Tensor, contrast: Contrast, row: int) -> None:
    axes.set_axis_off()
    draw_grey(axes, picture)
    if contrast.maps is None:
        return
    strength = contrast.maps[row].detach().float().cpu().abs()
    largest = float(strength.max())
    for place, index in enumerate(contrast.filters[row].tolist()):
        if largest > 0:
            colour = torch.tensor([int(filter_colour(index)[at : at + 2], 16) / 255 for at in (1, 3, 5)], device="cpu")
            painted = colour.expand(*strength.shape[1:], 3)
            axes.imshow(torch.cat([painted, 0.75 * strength[place][..., None] / largest], dim=2))


def _draw_bars(axes: Any, contrast: Contrast, row: int) -> None:
    filters = contrast.filters[row].tolist()
    added = contrast.contribution[row]
    rest = float(added.sum() - added[filters].sum())
    values = [*added[filters].tolist(), rest, float(contrast.constant[row])]
    stars = [" *" if bool(contrast.deciding[row, index]) else "" for index in filters]  # at those that decide
    labels = [f"filter {index}{star}" for index, star in zip(filters, stars, strict=True)]
    labels += ["other filters", "no filter"]
    colours = [*map(filter_colour, filters), "0.6", "0.8"]
    axes.barh(range(len(values)), values, color=colours)
    axes.set_yticks(range(len(values)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
