"""Deletion and insertion: does the probability fall and rise with the pixels that a map calls important?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_csg.checks import check_choice
from timm_csg.judging.maps import (
    Explain,
    as_found,
    batches,
    check_count,
    check_maps,
    given_or_made,
    of_targets,
    probabilities,
)
from timm_csg.judging.results import Judged, judged, of_another_picture
from timm_csg.running import check_labelled

Game = Literal["deletion", "insertion"]
KERNEL, SIGMA = 11, 5.0  # of the blur in the code of RISE


def deletion(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Judged:
    """Area under the target's probability while pixels are removed, the most important first: **low is good**.

    RISE (Petsiuk et al., BMVC 2018, https://arxiv.org/abs/1806.07421, section 4.1, and their code): pixels are set to
    0, the mean colour of normalised images, see ``probability_curve``. Chance: the same with the maps of other
    pictures.
    Misleads: pictures with holes are unlike anything in training, and scattered pixels destroy them fast, whatever they
    show; compare maps of one model, not models, whose probabilities differ before the first pixel.

    Args:
        explain: Any ``(model, images, targets) -> maps [batch, height, width]``.
        model: Anything that returns logits [batch, classes]; left as found.
        images: [pictures, channels, height, width], normalised as in training.
        targets: Classes that are explained and whose probability is followed [pictures].
        maps: Those of the images [pictures, height, width], if they were made before.
        steps: In which all pixels are changed.
        batch_size: Pictures at a time.
        seed: Of the order of pixels with equal values.

    Returns:
        Mean area, that of the maps of other pictures, and the area of every picture, each from 0 to 1.

    Raises:
        TypeError, ValueError: If maps, images or targets are not as stated.

    Example:
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> model[2].weight.data = torch.tensor([[9.0], [0.0]])
        >>> images = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]])
        >>> found = deletion(lambda model, images, targets: images[:, 0], model, images, torch.tensor([0]), steps=4)
        >>> round(found.score, 3)  # probabilities 1, then 0.5 four times
        0.562
    """
    maps = given_or_made(maps, explain, model, images, targets, batch_size, seed)
    return _played("deletion", model, images, targets, maps, steps=steps, batch_size=batch_size, seed=seed)


def insertion(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Judged:
    """Area under the target's probability while a blurred picture becomes sharp, important pixels first: high is good.

    RISE (Petsiuk et al., BMVC 2018), as ``deletion``; the start is the picture behind a Gaussian blur of 5 pixels cut
    to 11 x 11, as in their code, but with the picture's mirror image beyond its borders, where theirs has black.
    Chance: the same with the maps of other pictures. Misleads: where the blurred picture is already recognised, every
    map does well; compare maps of one model.

    Args:
        explain: See ``deletion``.
        model: See ``deletion``.
        images: See ``deletion``.
        targets: See ``deletion``.
        maps: See ``deletion``.
        steps: See ``deletion``.
        batch_size: See ``deletion``.
        seed: See ``deletion``.

    Returns:
        Mean area, that of the maps of other pictures, and the area of every picture, each from 0 to 1.

    Raises:
        TypeError, ValueError: As ``deletion``.
    """
    maps = given_or_made(maps, explain, model, images, targets, batch_size, seed)
    return _played("insertion", model, images, targets, maps, steps=steps, batch_size=batch_size, seed=seed)


def probability_curve(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    *,
    game: Game = "deletion",
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Tensor:
    """The target's probability after each step of ``deletion`` or ``insertion``.

    Pixels change in order of the map, the largest values first; equal values, of which an up-sampled or rectified map
    has many, in random order. After step i of s, round(i * pixels / s) of them are changed. The area of a curve is
    (its sum - half of its ends) / s.

    Args:
        model: Anything that returns logits [batch, classes]; left as found.
        images: [pictures, channels, height, width].
        targets: [pictures].
        maps: [pictures, height, width], for example of another package.
        game: ``"deletion"`` starts with the picture and ends with 0, ``"insertion"`` starts blurred and ends with it.
        steps: See ``deletion``.
        batch_size: Pictures at a time.
        seed: Of the order of pixels with equal values.

    Returns:
        float32 [pictures, steps + 1].

    Raises:
        TypeError, ValueError: As ``deletion``.
    """
    check_choice("game", game, ("deletion", "insertion"))
    check_labelled(model, images, targets)
    check_count("steps", steps)
    maps = check_maps(maps, images, "maps")
    generator = torch.Generator().manual_seed(seed)
    curves = []
    with as_found(model, seed):
        start = 0
        for batch, labels in batches(model, images, targets, batch_size):
            ranks = _ranks(maps[start : start + len(batch)], generator).to(batch.device)
            start += len(batch)
            blank = torch.zeros_like(batch)
            first, last = (batch, blank) if game == "deletion" else (blurred(batch), batch)
            points = []
            for step in range(steps + 1):
                changed = (ranks < round(step * ranks[0].numel() / steps))[:, None]
                mixed = torch.where(changed, last, first)
                points.append(of_targets(probabilities(model, mixed), labels))
            curves.append(torch.stack(points, dim=1).cpu())
    return torch.cat(curves)


def area(curves: Tensor) -> Tensor:
    """Area under each curve [..., points] over the share of changed pixels, by trapezoids.

    Example:
        >>> area(torch.tensor([1.0, 0.5, 0.0]))
        tensor(0.5000)
    """
    return (curves.sum(dim=-1) - (curves[..., 0] + curves[..., -1]) / 2) / (curves.shape[-1] - 1)


def blurred(images: Tensor) -> Tensor:
    """Images behind the Gaussian blur; mirrored at the border as often as a small image needs."""
    offsets = torch.arange(KERNEL, dtype=torch.float64, device="cpu") - KERNEL // 2
    weight = (-(offsets**2) / (2 * SIGMA**2)).exp()
    weight = (weight / weight.sum()).to(images)
    channels, pad = images.shape[1], KERNEL // 2
    down = weight.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    padded = _mirrored(_mirrored(images, pad, 2), pad, 3)
    return F.conv2d(F.conv2d(padded, down, groups=channels), down.transpose(2, 3), groups=channels)


def _mirrored(images: Tensor, pad: int, dim: int) -> Tensor:
    """Reflected at the outer edge of the border pixels along one dimension, like SciPy's ``reflect``."""
    size = images.shape[dim]
    places = torch.arange(-pad, size + pad, device=images.device).remainder(2 * size)
    return images.index_select(dim, torch.where(places < size, places, 2 * size - 1 - places))


def _ranks(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Place of every pixel in the order of its map, 0 for the largest [pictures, height, width]."""
    flat = maps.flatten(1).cpu()
    shuffled = torch.rand(flat.shape, generator=generator, device="cpu").argsort(dim=1)
    order = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    order = shuffled.gather(1, order)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks).view(maps.shape)


def _played(game: Game, model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, **options: int) -> Judged:
    both = (maps, of_another_picture(maps)) if len(maps) > 1 else (maps,)
    areas = [area(probability_curve(model, images, targets, given, game=game, **options)) for given in both]
    return judged(areas[0], areas[1] if len(areas) > 1 else torch.nan)
