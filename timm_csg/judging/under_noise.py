"""How alike two maps are, and how alike a picture's maps stay under noise that no one would see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_csg.checks import check_fraction
from timm_csg.judging.maps import Explain, as_found, check_count, given_or_made, maps_of
from timm_csg.judging.results import Judged, judged, of_another_picture


def map_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of each pair of maps, as in Adebayo et al., NeurIPS 2018 (absolute values not taken).

    Equal values share their mean rank. A constant map is unlike any other (0), but like another constant one (1).

    Args:
        first: [pictures, height, width].
        second: The same shape.

    Returns:
        float32 [pictures], from -1 to 1.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> map_similarity(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 4.0, 9.0]]]))
        tensor([1.])
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(
            f"maps to compare must both be [pictures, height, width], but are {list(first.shape)} and "
            f"{list(second.shape)}."
        )
    ranks = [_centred_ranks(maps) for maps in (first, second)]
    sizes = [part.square().sum(dim=1).sqrt() for part in ranks]
    both = sizes[0] * sizes[1]
    similarity = (ranks[0] * ranks[1]).sum(dim=1) / both.where(both > 0, 1)
    constant = [size == 0 for size in sizes]
    return similarity.where(~(constant[0] & constant[1]), 1.0).float()


def stability(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    noise: float = 0.2,
    clip: float = 0.25,
    samples: int = 2,
    batch_size: int = 32,
    seed: int = 0,
) -> Judged:
    """Rank correlation of a picture's map with its maps under noise: high is good, if chance is low.

    Noise N(0, noise²) on the normalised picture, cut at ±clip, as Huang et al. use it for parts (ICCV 2023,
    https://arxiv.org/abs/2212.05946); the target stays. Chance: the rank correlation of the maps of different pictures.
    Misleads: **a map that does not look at the picture is perfectly stable**; ``centre_map`` has 1, and so has its
    chance.

    Args:
        explain: Any ``(model, images, targets) -> maps [batch, height, width]``.
        model: Left as found.
        images: [pictures, channels, height, width], normalised as in training.
        targets: Classes that are explained [pictures].
        maps: Those of the images [pictures, height, width], if they were made before.
        noise: Standard deviation, in units of normalised pixels.
        clip: Largest change of a pixel.
        samples: Noisy copies of each picture.
        batch_size: Pictures at a time.
        seed: Of the noise.

    Returns:
        Mean similarity, chance, and the mean of each picture.

    Raises:
        TypeError, ValueError: If maps, images, targets or an option are not as stated.

    Example:
        >>> def brightness(model, images, targets):
        ...     return images.mean(dim=1)
        >>> images = torch.arange(64.0).view(1, 1, 8, 8)
        >>> stability(brightness, nn.Linear(1, 1), images, torch.tensor([0]), noise=0.1).score > 0.99
        True
    """
    check_fraction("noise", noise)
    check_fraction("clip", clip)
    check_count("samples", samples)
    maps = given_or_made(maps, explain, model, images, targets, batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with as_found(model, seed + 1):
        for _ in range(samples):
            added = (noise * torch.randn(images.shape, generator=generator, device="cpu")).clamp(-clip, clip).to(images)
            found.append(map_similarity(maps, maps_of(explain, model, images + added, targets, batch_size)))
    return judged(torch.stack(found).mean(dim=0), between_pictures(maps))


def between_pictures(maps: Tensor) -> Tensor | float:
    """How alike the maps of different pictures are: what a similarity has to be compared with; NaN for one picture."""
    return map_similarity(maps, of_another_picture(maps)) if len(maps) > 1 else torch.nan


def _centred_ranks(maps: Tensor) -> Tensor:
    """Mean ranks minus their mean, float64 [pictures, pixels]."""
    flat = maps.flatten(1)
    values, order = flat.sort(dim=1)
    new = torch.ones_like(values, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    group = new.long().cumsum(dim=1) - 1  # of equal values, counted along each row
    places = torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64).expand_as(flat)
    nothing = torch.zeros_like(places)
    mean = nothing.scatter_add(1, group, places) / nothing.scatter_add(1, group, torch.ones_like(places)).clamp_min(1)
    ranks = torch.empty_like(places).scatter_(1, order, mean.gather(1, group))
    return ranks - (flat.shape[1] - 1) / 2
