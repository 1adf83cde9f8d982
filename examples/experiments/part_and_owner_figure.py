"""The figure of parts_and_owners.py: for some classes, an own filter on the head and an own filter on the legs."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from animal_pictures import read_pictures
from part_figure import draw
from torch import Tensor
from torchvision.transforms import v2

from timm_csg.metrics.instability import Peaks

Seen = tuple[Peaks, Tensor]
CLASSES, PICTURES = 6, 4


def nearest_filter(seen: Seen, marks: Tensor, index: int, own: Tensor) -> int:
    """Of a class's own filters, the one that peaks nearest to a landmark in the class's pictures, on average.

    Pictures in which a filter is silent do not count, nor filters that are silent in half of them.
    """
    peaks, _ = seen
    rows = (peaks.targets == index) & ~marks.isnan().any(dim=1)
    distance = (peaks.place[rows] - marks[rows, None]).norm(dim=2)
    answers = (peaks.strength[rows] > 0).float()
    mean = (distance * answers).sum(dim=0) / answers.sum(dim=0)
    return int(mean.where(own & (answers.mean(dim=0) > 0.5), torch.inf).argmin())


def draw_parts(
    path: Path,
    data: Path,
    size: int,
    beta: float,
    names: list[str],
    owners: Tensor,
    seen: tuple[Seen, Seen],
    marks: tuple[Tensor, Tensor],
) -> dict[str, dict[str, int]]:
    """Draw the classes with the most annotated legs; filters are chosen on training pictures, and drawn on others.

    Args:
        path: Where to.
        data: Folder of test.tar.
        size: Side of the network's input.
        beta: Width of the mask.
        names: Of the classes.
        owners: Assignment [classes, filters].
        seen: Places and mean responses in the training pictures, and in the test pictures.
        marks: Head and legs in both.

    Returns:
        The filter of each part of each class.
    """
    train, (peaks, means) = seen
    resize = v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    raw, _ = read_pictures(data / "test.tar")
    has_legs = ~marks[0][:, 1].isnan().any(dim=1)
    number = torch.bincount(train[0].targets[has_legs], minlength=len(names))
    classes = number.argsort(descending=True, stable=True)[:CLASSES].tolist()
    figure, grid = plt.subplots(
        len(classes),
        2 * PICTURES + 1,
        figsize=(11, 1.25 * len(classes)),
        width_ratios=[*[1] * PICTURES, 0.2] + [1] * PICTURES,
        squeeze=False,
    )
    chosen: dict[str, dict[str, int]] = {}
    for line, index in zip(grid, classes, strict=True):
        members = (peaks.targets == index).nonzero()[:, 0]
        chosen[names[index]] = {}
        for part, name in enumerate(("head", "legs")):
            kernel = nearest_filter(train, marks[0][:, part], index, owners[index] > 0.5)
            chosen[names[index]][name] = kernel
            best = members[means[members, kernel].argsort(descending=True)[:PICTURES]]
            for axes, image in zip(line[part * (PICTURES + 1) :], best, strict=False):
                draw(axes, resize(raw[image]), peaks.place[image, kernel], beta=beta, colour=("lime", "orange")[part])
            line[part * (PICTURES + 1)].set_xlabel(f"filter {kernel}", fontsize=6, labelpad=1)
        line[PICTURES].axis("off")
        line[0].set_ylabel(names[index], fontsize=7)
    for column, title in ((1, "this class: head filter"), (PICTURES + 2, "this class: leg filter")):
        grid[0, column].set_title(title, fontsize=9)
    figure.subplots_adjust(0.03, 0.03, 0.998, 0.95, wspace=0.03, hspace=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85)
    plt.close(figure)
    return chosen
