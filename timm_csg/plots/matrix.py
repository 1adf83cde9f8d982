"""The picture of a class-filter matrix: classes down, filters across, sorted so that owners stand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_csg.plots._figure import AS_IT_IS, drawable, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def class_filter_figure(
    matrix: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    title: str = "",
    label: str = "gate",
    maximum: float | None = None,
    order: Tensor | None = None,
) -> Figure:
    """Draw a gate or a mutual-information matrix as a heat map.

    Args:
        matrix: [classes, filters], 0 or more.
        class_names: Names of the rows; None: their numbers.
        title: Above the picture.
        label: Of the colour bar, with the unit.
        maximum: Upper end of the colour scale; None: the largest entry.
        order: Order of the filters [filters], from ``filter_order`` of another matrix; None: by owner.

    Returns:
        A matplotlib figure, not registered with pyplot and shown by notebooks; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is missing; the message names the extra.
        ValueError: If the names do not fit the rows.
    """
    num_classes, num_filters = matrix.shape
    names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise ValueError(f"there are {num_classes} rows but {len(names)} class names.")
    order = filter_order(matrix) if order is None else order
    figure = new_figure(figsize=(8.0, 1.4 + min(6.0, 0.24 * num_classes)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        matrix[:, order].float().cpu().numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="magma_r",
        vmin=0,
        vmax=float(matrix.max()) if maximum is None else maximum,
    )
    axes.set_xlabel(f"{num_filters} filters, sorted by owner")
    if num_classes <= 40:
        axes.set_yticks(range(num_classes), [drawable(name, 40) for name in names], **AS_IT_IS)
    else:
        axes.set_ylabel(f"{num_classes} classes")
    axes.set_title(drawable(title), loc="left", **AS_IT_IS)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).set_label(drawable(label), **AS_IT_IS)
    return figure


def filter_order(matrix: Tensor) -> Tensor:
    """Filters by owner, strongest first within a class.

    Args:
        matrix: [classes, filters].

    Returns:
        Filter indices, int64 [filters].

    Example:
        >>> filter_order(torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]))
        tensor([2, 1, 0])
    """
    peaks, owner = matrix.max(dim=0)
    by_strength = torch.argsort(peaks, descending=True, stable=True)
    return by_strength[torch.argsort(owner[by_strength], stable=True)]
