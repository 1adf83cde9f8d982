"""Sanity checks: a map must change when the weights are destroyed, and when another class is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg.judging.maps import Explain, as_found, check_count, given_or_made, maps_of, probabilities
from timm_csg.judging.results import Judged, judged
from timm_csg.judging.under_noise import between_pictures, map_similarity
from timm_csg.running import as_input


def weight_randomisation(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    points: int = 4,
    batch_size: int = 32,
    seed: int = 0,
) -> Judged:
    """Rank correlation of maps before and after weights were destroyed from the last layer on: low is good.

    Cascading randomisation (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018,
    https://arxiv.org/abs/1810.03292, section 3.1). The similarity is measured at ``points`` evenly spaced stages of
    the cascade, the last of which has no trained weight left, and their mean is the score. The paper draws new weights;
    here the entries of every parameter are shuffled, which keeps their sizes and works for parameters of any kind.
    Statistics of batch norms stay. Chance: the rank correlation of the maps of different pictures.
    Misleads: maps on a coarse grid are alike by their shape; an edge detector passes for an explanation that "sees" the
    object, and this is what the check finds (``edge_map`` has 1).

    Args:
        explain: Any ``(model, images, targets) -> maps [batch, height, width]``; called with the same model, whose
            weights have changed.
        model: Left as found.
        images: [pictures, channels, height, width], normalised as in training.
        targets: Classes that are explained [pictures].
        maps: Those of the images [pictures, height, width], if they were made before.
        points: Of the cascade at which maps are compared.
        batch_size: Pictures at a time.
        seed: Of the shuffling.

    Returns:
        Mean similarity, chance, and the mean of each picture.

    Raises:
        TypeError, ValueError: If maps, images or targets are not as stated.

    Example:
        >>> def blind(model, images, targets):
        ...     return images.mean(dim=1)
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> weight_randomisation(blind, model, torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).score
        1.0
    """
    check_count("points", points)
    maps = given_or_made(maps, explain, model, images, targets, batch_size, seed)
    found = []
    with as_found(model, seed + 1), cascade(model, points, seed) as stages:
        for _ in stages:
            found.append(map_similarity(maps, maps_of(explain, model, images, targets, batch_size)))
    return judged(torch.stack(found).mean(dim=0), between_pictures(maps))


def random_logit(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Judged:
    """Rank correlation of the target's map with that of another class, drawn at random: low is good.

    Sixt et al., "When explanations lie", ICML 2020, https://arxiv.org/abs/1912.09818, section 4; they take SSIM.
    Chance: the rank correlation of the maps of different pictures. A map that is the same for all classes (guided
    backprop nearly is) says what is in the picture, not why it is this class.

    Args:
        explain: Any ``(model, images, targets) -> maps [batch, height, width]``.
        model: Anything that returns logits [batch, classes], two classes or more; left as found.
        images: [pictures, channels, height, width], normalised as in training.
        targets: Classes that are explained [pictures].
        maps: Those of the images [pictures, height, width], if they were made before.
        batch_size: Pictures at a time.
        seed: Of the other classes.

    Returns:
        Mean similarity, chance, and the similarity of each picture.

    Raises:
        TypeError, ValueError: If maps, images or targets are not as stated, or there is one class only.

    Example:
        >>> def blind(model, images, targets):
        ...     return images.mean(dim=1)
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> random_logit(blind, model, torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).score
        1.0
    """
    maps = given_or_made(maps, explain, model, images, targets, batch_size, seed)
    with as_found(model, seed + 1):
        num_classes = probabilities(model, as_input(model, images[:1])).shape[1]
        others = maps_of(explain, model, images, other_classes(targets, num_classes, seed), batch_size)
    return judged(map_similarity(maps, others), between_pictures(maps))


def other_classes(targets: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """A class for every picture that is not its target, all others equally likely [pictures].

    Raises:
        ValueError: If there is no other class.

    Example:
        >>> other_classes(torch.tensor([0, 1]), 2)
        tensor([1, 0])
    """
    if num_classes < 2:
        raise ValueError(f"another class can be asked for only if there are two or more, but there is {num_classes}.")
    step = torch.randint(1, num_classes, targets.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return (targets.cpu() + step).remainder(num_classes).to(targets.device)


@contextmanager
def cascade(model: nn.Module, points: int, seed: int = 0) -> Iterator[Iterator[int]]:
    """Iterate over numbers of layers whose parameters are shuffled, from the last one on; all are put back."""
    layers = [list(module.parameters(recurse=False)) for module in model.modules()]
    layers = [parameters for parameters in layers if parameters][::-1]
    kept = {parameter: parameter.detach().clone() for parameters in layers for parameter in parameters}
    counts = [round(len(layers) * (point + 1) / points) for point in range(points)]
    try:
        yield _shuffled(layers, counts, torch.Generator().manual_seed(seed))
    finally:
        with torch.no_grad():
            for parameter, values in kept.items():
                parameter.copy_(values)


def _shuffled(layers: list[list[Any]], counts: list[int], generator: torch.Generator) -> Iterator[int]:
    done = 0
    for count in counts:
        for parameters in layers[done:count]:
            for parameter in parameters:
                order = torch.randperm(parameter.numel(), generator=generator, device="cpu").to(parameter.device)
                with torch.no_grad():
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
        done = max(done, count)
        yield done
