"""Do filters stay on one part of the object? Consistency and stability from landmarks, as for prototypes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from timm_csg.checks import check_fraction
from timm_csg.judging.results import Judged, judged, of_another_picture
from timm_csg.running import pairs

HALF_SIDE = 36 / 224
"""Half a side of EvalProtoPNet's square, as a share of the picture's side."""


def with_noise(
    loader: Iterable[tuple[Tensor, Tensor]], *, noise: float = 0.2, clip: float = 0.25, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader with noise on the pictures, for ``collect_peaks`` before ``part_stability``.

    The noise of EvalProtoPNet (Huang et al., ICCV 2023, https://arxiv.org/abs/2212.05946).

    Args:
        loader: Yields (images, targets), normalised as in training.
        noise: Standard deviation, in units of normalised pixels.
        clip: Largest change of a pixel.
        seed: Of the noise.

    Yields:
        Noisy pictures [batch, channels, height, width] and their targets.

    Example:
        >>> ((images, targets),) = with_noise([(torch.zeros(1, 3, 8, 8), torch.tensor([1]))])
        >>> float(images.abs().max()) <= 0.25, targets
        (True, tensor([1]))
    """
    generator = torch.Generator().manual_seed(seed)
    for images, targets in pairs(loader):
        added = (noise * torch.randn(images.shape, generator=generator, device="cpu")).clamp(-clip, clip)
        yield images + added.to(images), targets


def part_hits(places: Tensor, points: Tensor, half_side: float) -> Tensor:
    """Which landmarks lie in the square around each filter's strongest position.

    Huang et al., ICCV 2023 (https://arxiv.org/abs/2212.05946, EvalProtoPNet): half a side of 36 pixels in pictures of
    224, so 26 for 160. A square can hold several landmarks.

    Args:
        places: x, y of each filter's strongest position in pixels [pictures, filters, 2], as in ``metrics.Peaks``.
        points: x, y of the landmarks, NaN where one is not to be seen [pictures, parts, 2].
        half_side: From the middle of the square to its edge, in pixels.

    Returns:
        bool [pictures, filters, parts].

    Raises:
        ValueError: If shapes do not fit, or the square has no size.

    Example:
        >>> part_hits(torch.tensor([[[10.0, 10.0]]]), torch.tensor([[[12.0, 5.0], [30.0, 10.0]]]), 8)
        tensor([[[ True, False]]])
    """
    check_fraction("half_side", half_side)
    is_right = places.ndim == points.ndim == 3 and places.shape[2] == points.shape[2] == 2
    if not is_right or len(places) != len(points) or 0 in (*places.shape, *points.shape):
        raise ValueError(
            "places must be [pictures, filters, 2] and points [pictures, parts, 2] of the same pictures, but they are "
            f"{list(places.shape)} and {list(points.shape)}; collect_peaks and Annotations.points make them."
        )
    apart = (places[:, :, None] - points[:, None].to(places)).abs()
    return (apart <= half_side).all(dim=3)  # false for NaN


def part_consistency(
    places: Tensor, points: Tensor, targets: Tensor, owners: Tensor, *, half_side: float, share: float = 0.8
) -> Judged:
    """Share of filters that hit one and the same part in most pictures of their class.

    EvalProtoPNet (Huang et al., ICCV 2023, see ``part_hits``): a filter is consistent if some part is hit in at least
    ``share`` of the pictures of the filter's class in which that part is to be seen. Chance: the same with the
    landmarks of other pictures, which are found by any filter that always looks at the same place. Misleads: objects
    that are all in the middle and large squares make everything consistent; a part that is seen in one picture only
    counts like any other.

    Args:
        places: See ``part_hits``.
        points: See ``part_hits``.
        targets: Class of each picture [pictures].
        owners: Class of each filter, negative for none [filters].
        half_side: See ``part_hits``.
        share: Of the pictures.

    Returns:
        Share of consistent filters, chance, and 1 or 0 for each filter; NaN without an owner, or a landmark in its
        pictures.

    Raises:
        ValueError: If shapes do not fit, or no filter can be judged.

    Example:
        >>> places = torch.tensor([[[1.0, 1.0]], [[9.0, 9.0]]])
        >>> heads = torch.tensor([[[2.0, 1.0]], [[8.0, 9.0]]])
        >>> part_consistency(places, heads, torch.tensor([0, 0]), torch.tensor([0]), half_side=2)
        Judged(score=1, chance=0, values=tensor([1.]), seconds=nan)
    """
    check_fraction("share", share, 0.0, 1.0)
    found, by_chance = (
        _consistent(part_hits(places, given, half_side), given, targets, owners, share)
        for given in (points, of_another_picture(points))
    )
    return judged(found, by_chance)


def part_stability(
    places: Tensor, noisy_places: Tensor, points: Tensor, targets: Tensor, owners: Tensor, *, half_side: float
) -> Judged:
    """Share of a class's pictures in which a filter hits exactly the same parts under noise.

    EvalProtoPNet (Huang et al., ICCV 2023, see ``part_hits``), noise N(0, .2²) on normalised pictures, cut at ±.25; the
    mean over filters. Chance: the noisy places of other pictures. Misleads: a filter that never hits a part is
    perfectly stable, and so is one that hits all of them.

    Args:
        places: See ``part_hits``.
        noisy_places: Those of the same pictures with noise, the same shape.
        points: See ``part_hits``.
        targets: Class of each picture [pictures].
        owners: Class of each filter, negative for none [filters].
        half_side: See ``part_hits``.

    Returns:
        Mean share, chance, and the share of each filter; NaN without an owner or pictures.

    Raises:
        ValueError: If shapes do not fit, or no filter can be judged.

    Example:
        >>> places, head = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0, 1.0]]])
        >>> part_stability(places, places + 9, head, torch.tensor([0]), torch.tensor([0]), half_side=2).score
        0.0
    """
    if places.shape != noisy_places.shape:
        raise ValueError(
            f"both places must have one shape, but have {list(places.shape)} and {list(noisy_places.shape)}."
        )
    hits = part_hits(places, points, half_side)
    own = _own(targets, owners, hits)
    shares = []
    for given in (noisy_places, of_another_picture(noisy_places)):
        same = (part_hits(given, points, half_side) == hits).all(dim=2)
        shares.append((same & own).sum(dim=0) / own.sum(dim=0))  # 0 / 0 is NaN
    return judged(*shares)


def _consistent(hits: Tensor, points: Tensor, targets: Tensor, owners: Tensor, share: float) -> Tensor:
    """1 or 0 for each filter, NaN where there is nothing to hit."""
    own = _own(targets, owners, hits)
    seen = (~points.isnan().any(dim=2)).to(hits.device)
    possible = torch.einsum("if,ip->fp", own.float(), seen.float())
    hit = torch.einsum("if,ifp->fp", own.float(), hits.float())
    consistent = ((hit >= share * possible - 1e-6) & (possible > 0)).any(dim=1)
    return consistent.float().masked_fill(~(possible > 0).any(dim=1), torch.nan)


def _own(targets: Tensor, owners: Tensor, hits: Tensor) -> Tensor:
    """Whether a picture is of a filter's class, bool [pictures, filters]."""
    if len(targets) != len(hits) or len(owners) != hits.shape[1]:
        raise ValueError(
            f"there must be a target for each of {len(hits)} pictures and an owner for each of {hits.shape[1]} "
            f"filters, but there are {len(targets)} and {len(owners)}."
        )
    return targets.to(hits.device)[:, None] == owners.to(hits.device)
