"""Grid pointing game: several pictures in one, and how much of a class's map lies on its own picture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_csg.checks import check_fraction
from timm_csg.judging.maps import Explain, as_found, batches, check_count, maps_of, probabilities
from timm_csg.judging.results import Judged, judged
from timm_csg.metrics.display import in_one_line
from timm_csg.running import check_labelled


@in_one_line
class Grids(NamedTuple):
    """What ``make_grids`` returns.

    Attributes:
        rows: Which picture stands in each cell, row by row, int64 [grids, side * side].
        targets: Their classes, all different within a grid [grids, side * side].
    """

    rows: Tensor
    targets: Tensor


def grid_pointing_game(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    side: int = 2,
    grids: int | Grids = 250,
    confidence: float = 0.5,
    smooth: int = 1,
    shrink: bool = False,
    batch_size: int = 32,
    seed: int = 0,
) -> Judged:
    """Share of a class's positive attribution that lies on its own picture, in grids of side x side pictures.

    The protocol of the B-cos networks (Boehle et al., CVPR 2022, https://arxiv.org/abs/2205.10268, and their code; the
    metric is that of CoDA-Nets, CVPR 2021): the pictures of a grid are of different classes, each rightly and
    confidently classified on its own, the most confident first (see ``make_grids``). Every class c in the grid is
    explained on the whole grid, with map M_c: value = sum of max(M_c, 0) over the class's cell / sum over the grid,
    0 where nothing is positive. Chance is 1 / side². There are no boxes and no other data in it, but the grid is a
    picture that the model has not seen the like of, and larger than those it was trained on.

    Args:
        explain: Any ``(model, images, targets) -> maps [batch, height, width]``.
        model: Anything that returns logits [batch, classes]; left as found. It must take images ``side`` times as
            large, or see ``shrink``.
        images: Pictures to build grids of [pictures, channels, height, width], normalised as in training.
        targets: Their classes [pictures].
        side: Pictures along one side of the grid: 2 or 3 in the papers.
        grids: How many, at most: each picture is used once. Or those of ``make_grids``, so that the model need not look
            at all pictures again for every kind of map; ``confidence`` is not asked then.
        confidence: Least probability of the true class for a picture to be used; the code of the paper asks the same
            of a sigmoid.
        smooth: Maps are averaged over squares of so many pixels first (odd). The paper's code does it with 15, for maps
            of single pixels whose signs alternate.
        shrink: Bring grids to the size of a picture, for models of a fixed input size.
        batch_size: Pictures of an ordinary size at a time.
        seed: Of the choice of classes.

    Returns:
        Score, chance, and the values of all cells, grid by grid [grids * side²].

    Raises:
        ValueError: If there are not enough classes with a confidently classified picture, or an argument is wrong.

    Example:
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # four colours, four classes
        >>> images = 9 * torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2)
        >>> def colour(model, images, targets):
        ...     return images[torch.arange(len(images)), targets]
        >>> grid_pointing_game(colour, model, images, torch.arange(4))
        Judged(score=1, chance=0.25, values=tensor([1., 1., 1., 1.]), seconds=nan)
    """
    check_labelled(model, images, targets)
    check_count("side", side, 2)
    check_count("smooth", smooth)
    if smooth % 2 == 0:
        raise ValueError(f"smooth must be an odd number of pixels, so that maps stay in place, but is {smooth}.")
    with as_found(model, seed):
        if isinstance(grids, Grids):
            chosen = _checked(grids, side, len(images))
        else:
            chosen = _choose(model, images, targets, side, grids, confidence, batch_size, seed)
        values = []
        at_once = max(1, batch_size // side**4)
        for rows, labels in zip(chosen.rows.split(at_once), chosen.targets.split(at_once), strict=True):
            pictures = torch.stack([_tile(images[one], side) for one in rows.cpu()])
            if shrink:
                pictures = F.interpolate(pictures, images.shape[-2:], mode="bilinear", antialias=True)
            many = pictures.repeat_interleave(side**2, dim=0)
            values.append(_inside(maps_of(explain, model, many, labels.flatten(), len(many)), side, smooth))
    return judged(torch.cat(values), 1 / side**2)


def make_grids(
    chances: Tensor, targets: Tensor, *, side: int = 2, grids: int = 250, confidence: float = 0.5, seed: int = 0
) -> Grids:
    """Which pictures stand together, as in the code of the B-cos networks (Boehle et al., CVPR 2022).

    Of every class only pictures count that are rightly classified with at least ``confidence``, the most confident
    first. Again and again side² classes are drawn from those that have a picture left, and each gives its next one.

    Args:
        chances: Probabilities [pictures, classes].
        targets: True classes [pictures].
        side: See ``grid_pointing_game``.
        grids: At most so many; fewer where the pictures run out.
        confidence: See ``grid_pointing_game``.
        seed: Of the classes drawn.

    Returns:
        Rows and classes of the cells.

    Raises:
        ValueError: If fewer than side² classes have a picture that counts.

    Example:
        >>> make_grids(torch.eye(4), torch.arange(4)).rows.sort().values
        tensor([[0, 1, 2, 3]])
    """
    check_count("grids", grids)
    check_fraction("confidence", confidence, 0.0, 1.0)
    own = chances.gather(1, targets[:, None])[:, 0]
    counts = (chances.argmax(dim=1) == targets) & (own >= confidence)
    left = {}
    for index in targets.unique().tolist():
        rows = (counts & (targets == index)).nonzero()[:, 0]
        left[index] = rows[own[rows].argsort(descending=True, stable=True)].tolist()
    able = [index for index, rows in left.items() if rows]
    if len(able) < side**2:
        raise ValueError(
            f"a grid of {side} x {side} needs {side**2} classes with a picture that is rightly classified with a "
            f"probability of at least {confidence:g}, but only {len(able)} of {len(left)} {_has(able)} one; pass more "
            "pictures, a lower confidence, or a smaller side."
        )
    generator = torch.Generator().manual_seed(seed)
    found: list[list[tuple[int, int]]] = []
    while len(able) >= side**2 and len(found) < grids:
        places = torch.randperm(len(able), generator=generator, device="cpu")[: side**2]
        drawn = [able[place] for place in places.tolist()]
        found.append([(left[index].pop(0), index) for index in drawn])
        able = [index for index in able if left[index]]
    cells = torch.tensor(found, device="cpu")
    return Grids(cells[..., 0], cells[..., 1])


def _has(able: list[int]) -> str:
    return "has" if len(able) == 1 else "have"


def _choose(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    side: int,
    grids: int,
    confidence: float,
    batch_size: int,
    seed: int,
) -> Grids:
    chances = torch.cat([probabilities(model, batch).cpu() for batch, _ in batches(model, images, targets, batch_size)])
    if int(targets.max()) >= chances.shape[1]:
        raise ValueError(f"the model has {chances.shape[1]} classes, but there is a target {int(targets.max())}.")
    return make_grids(chances, targets.cpu(), side=side, grids=grids, confidence=confidence, seed=seed)


def _checked(grids: Grids, side: int, pictures: int) -> Grids:
    rows, targets = grids
    if rows.ndim != 2 or rows.shape[1] != side**2 or rows.shape != targets.shape or not len(rows):
        raise ValueError(
            f"grids of {side} x {side} have rows and targets [grids, {side**2}], but these have {list(rows.shape)} and "
            f"{list(targets.shape)}; make them with make_grids(..., side={side})."
        )
    if int(rows.min()) < 0 or int(rows.max()) >= pictures:
        raise ValueError(
            f"the grids use picture {int(rows.max())} counted from 0, but there are {pictures} pictures; pass the "
            "pictures that the grids were made of."
        )
    return grids


def _tile(pictures: Tensor, side: int) -> Tensor:
    """Pictures [side², channels, height, width] row by row in one [channels, side * height, side * width]."""
    return torch.cat([torch.cat(list(row), dim=2) for row in pictures.split(side)], dim=1)


def _inside(maps: Tensor, side: int, smooth: int) -> Tensor:
    """Share of each map in its class's cell; the maps of one grid follow each other in the order of its cells."""
    if smooth > 1:
        maps = F.avg_pool2d(maps[:, None], smooth, stride=1, padding=smooth // 2)[:, 0]
    mass = F.adaptive_avg_pool2d(maps.clamp(min=0)[:, None].double(), side).flatten(1)
    cells = torch.arange(len(maps), device=maps.device) % side**2
    own, total = mass.gather(1, cells[:, None])[:, 0], mass.sum(dim=1)
    return torch.where(total > 0, own / total.clamp_min(1e-300), 0)
