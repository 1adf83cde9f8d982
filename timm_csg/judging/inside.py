"""Maps against boxes or masks of objects: pointing game, energy inside, plausibility. Pure functions of maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_csg.checks import whole
from timm_csg.judging.results import Judged, judged, of_another_picture
from timm_csg.metrics.regions import check_regions, is_boxes, region_masks


def pointing_game(maps: Tensor, objects: Tensor, *, tolerance: int = 0) -> Judged:
    """How often a map's largest value lies on the object.

    Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018, https://arxiv.org/abs/1608.00507,
    section 4.1, who forgive 15 pixels. Where several pixels are the largest, the share of them on the object counts, so
    that a flat map scores what chance does. Chance: the share of the picture that the object takes, with tolerance.
    Misleads: objects in the middle are hit by any map with a bias to the middle; judge ``centre_map`` too.

    Args:
        maps: [pictures, height, width].
        objects: Boxes x0, y0, x1, y1 in pixels of the maps, floating point [pictures, 4], or masks, bool
            [pictures, height, width]. A picture without an object (NaN, empty mask) is left out.
        tolerance: Pixels by which the object is enlarged to all sides.

    Returns:
        Share of hits, chance, and the hits.

    Raises:
        ValueError: If maps or objects are not as stated, or a box reaches beyond the picture.

    Example:
        >>> maps = torch.tensor([[[0.0, 5.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
        >>> pointing_game(maps, torch.tensor([[1.0, 0.0, 2.0, 1.0]] * 2))
        Judged(score=0.5, chance=0.25, values=tensor([1., 0.]), seconds=nan)
    """
    masks, seen = _masks(maps, objects, tolerance)
    largest = maps == maps.amax(dim=(1, 2), keepdim=True)
    hits = (largest & masks).sum(dim=(1, 2)) / largest.sum(dim=(1, 2))
    return judged(_only(hits, seen), _only(masks.float().mean(dim=(1, 2)), seen))


def energy_inside(maps: Tensor, objects: Tensor) -> Judged:
    """Share of a map's positive sum that lies on the object: the energy-based pointing game.

    Wang et al., "Score-CAM", CVPR workshops 2020, https://arxiv.org/abs/1910.01279, section 4.3; the same as relevance
    mass accuracy (Arras et al., 2022) for maps without negative values. A map without positive values has 0. Chance:
    the share of the picture that the object takes, which a flat map has.
    Misleads: a map that marks only one hair of the object has 1; large objects give every map much.

    Args:
        maps: See ``pointing_game``.
        objects: See ``pointing_game``.

    Returns:
        Mean share, chance, and the shares.

    Raises:
        ValueError: See ``pointing_game``.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, -5.0]]])
        >>> energy_inside(maps, torch.tensor([[0.0, 0.0, 1.0, 2.0]])).score
        0.75
    """
    masks, seen = _masks(maps, objects, 0)
    mass = maps.clamp(min=0).double()
    inside, total = (mass * masks).sum(dim=(1, 2)), mass.sum(dim=(1, 2))
    shares = torch.where(total > 0, inside / total.clamp_min(1e-300), 0)
    return judged(_only(shares.float(), seen), _only(masks.float().mean(dim=(1, 2)), seen))


def plausibility(maps: Tensor, objects: Tensor, *, dilate: int = 0) -> Judged:
    """Largest value of a map on the object / largest value anywhere: is the strongest evidence near the object's own?

    max(M * mask) / max(M) with a dilated mask, as in DINO-QPM (2026); negative values count as 0, a map without
    positive values has 0. Chance: the same maps dealt to other pictures, since a flat map has 1.
    Misleads: **it asks for the largest value only**. A map that lights up the whole picture is perfectly plausible;
    read it with ``energy_inside``.

    Args:
        maps: See ``pointing_game``.
        objects: See ``pointing_game``; boxes are generous enough for ``dilate=0``.
        dilate: Pixels by which the object is enlarged to all sides.

    Returns:
        Mean ratio, chance, and the ratios.

    Raises:
        ValueError: See ``pointing_game``.

    Example:
        >>> maps = torch.tensor([[[4.0, 1.0], [0.0, -5.0]]])
        >>> plausibility(maps, torch.tensor([[1.0, 0.0, 2.0, 2.0]])).score
        0.25
    """
    masks, seen = _masks(maps, objects, dilate)
    ratios, by_chance = (_ratio(given.clamp(min=0), masks) for given in (maps, of_another_picture(maps)))
    return judged(_only(ratios, seen), _only(by_chance, seen) if len(maps) > 1 else math.nan)


def _ratio(maps: Tensor, masks: Tensor) -> Tensor:
    largest = maps.amax(dim=(1, 2))
    return torch.where(largest > 0, (maps * masks).amax(dim=(1, 2)) / largest.clamp_min(1e-45), 0)


def _only(values: Tensor, seen: Tensor) -> Tensor:
    return values.float().masked_fill(~seen, torch.nan)


def _masks(maps: Tensor, objects: Tensor, enlarge: int) -> tuple[Tensor, Tensor]:
    """Masks, bool [pictures, height, width], and which pictures have an object."""
    if not isinstance(maps, Tensor) or maps.ndim != 3 or 0 in maps.shape or not bool(maps.isfinite().all()):
        found = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(
            f"maps must be finite and [pictures, height, width], as large as the pictures, but are {found}."
        )
    if (whole(enlarge) or 0) != enlarge or enlarge < 0:
        raise ValueError(f"an object is enlarged by a whole number of pixels, 0 or more, but not by {enlarge!r}.")
    size = (int(maps.shape[1]), int(maps.shape[2]))
    if len(objects) != len(maps):
        raise ValueError(f"there must be one object for every map, but there are {len(objects)} and {len(maps)}.")
    check_regions(objects, len(maps), 2, size, "objects")
    if is_boxes(objects):
        _check_inside(objects, size)
    masks = region_masks(objects.cpu(), slice(None), *size)
    seen = masks.flatten(1).any(dim=1)
    if enlarge:
        masks = F.max_pool2d(masks.float(), 2 * enlarge + 1, stride=1, padding=enlarge) > 0
    return masks.to(maps.device), seen.to(maps.device)


def _check_inside(boxes: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    beyond = (x0 < -0.5) | (y0 < -0.5) | (x1 > width + 0.5) | (y1 > height + 0.5) | (x1 <= x0) | (y1 <= y0)
    wrong = beyond.nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"boxes must be x0, y0, x1, y1 inside the picture of {width} x {height} pixels, but {len(wrong)} are not, "
            f"the first is number {wrong[0]}: {boxes[wrong[0]].tolist()}; Annotations.to_input brings them there."
        )
