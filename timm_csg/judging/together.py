"""All judges in one call, on maps that are made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg.checks import check_choice
from timm_csg.judging.grid import grid_pointing_game
from timm_csg.judging.inside import energy_inside, plausibility, pointing_game
from timm_csg.judging.maps import Explain, given_or_made
from timm_csg.judging.pixel_games import deletion, insertion
from timm_csg.judging.results import Judged
from timm_csg.judging.sanity import random_logit, weight_randomisation
from timm_csg.judging.under_noise import stability

_OF_GRIDS: dict[str, Callable[..., Judged]] = {
    "grid_2x2": partial(grid_pointing_game, side=2),
    "grid_3x3": partial(grid_pointing_game, side=3),
}
_OF_OBJECTS: dict[str, Callable[..., Judged]] = {
    "pointing_game": pointing_game,
    "energy_inside": energy_inside,
    "plausibility": plausibility,
}
_OF_MODELS: dict[str, Callable[..., Judged]] = {
    "deletion": deletion,
    "insertion": insertion,
    "stability": stability,
    "weight_randomisation": weight_randomisation,
    "random_logit": random_logit,
}
JUDGES = (*_OF_GRIDS, *_OF_OBJECTS, *_OF_MODELS)
"""Names of all judges."""


def judge(
    explain: Explain,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    judges: Sequence[str] | None = None,
    objects: Tensor | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Judged]:
    """What every judge says of one kind of map. Each has a function of its own, whose page tells how it can mislead.

    Args:
        explain: Any ``(model, images, targets) -> maps [batch, height, width]``: one of ours, or a few lines around
            those of another package. It is called with the given model, in eval mode and with gradients enabled.
        model: Anything that returns logits [batch, classes]; modes, weights, gradients and the random state are left as
            found.
        images: [pictures, channels, height, width], normalised as in training.
        targets: Class of each picture [pictures]: it is explained.
        judges: Names from ``JUDGES``; None: all that can judge here, those of objects only if there are ``objects``,
            and grids only if ``targets`` have as many classes as they have cells.
        objects: Boxes [pictures, 4] in pixels of the images, or masks [pictures, height, width]; see ``pointing_game``.
        options: Of single judges, for example ``{"deletion": {"steps": 50}}``.
        batch_size: Pictures at a time.
        seed: Of everything random.

    Returns:
        A ``Judged`` for each name.

    Raises:
        TypeError, ValueError: If a judge is unknown or cannot judge here, or maps, images, targets or objects are not
            as stated.

    Example:
        >>> import timm
        >>> from timm_csg import explain
        >>> model = timm.create_model("test_resnet", num_classes=3)
        >>> images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
        >>> list(judge(explain.grad_cam, model, images, targets))
        ['deletion', 'insertion', 'stability', 'weight_randomisation', 'random_logit']
    """
    chosen = _choose(judges, objects, targets)
    options = options or {}
    for name in options:
        check_choice("options", name, JUDGES)
    shared = {"batch_size": batch_size, "seed": seed}
    start = time.perf_counter()
    maps = None
    if any(name not in _OF_GRIDS for name in chosen):
        maps = given_or_made(None, explain, model, images, targets, batch_size, seed)
    seconds_for_maps = time.perf_counter() - start
    found = {}
    for name in chosen:
        start, own = time.perf_counter(), options.get(name, {})
        if name in _OF_GRIDS:
            one = _OF_GRIDS[name](explain, model, images, targets, **{**shared, **own})
        elif name in _OF_OBJECTS:
            one = _OF_OBJECTS[name](maps, objects, **own)
        else:
            one = _OF_MODELS[name](explain, model, images, targets, maps=maps, **{**shared, **own})
        extra = 0.0 if name in _OF_GRIDS else seconds_for_maps
        found[name] = one._replace(seconds=time.perf_counter() - start + extra)
    return found


def _choose(judges: Sequence[str] | None, objects: Tensor | None, targets: Tensor) -> list[str]:
    if isinstance(judges, str):
        raise TypeError(f"judges must be a list of names, [{judges!r}], but is a string.")
    if judges is not None:
        for name in judges:
            check_choice("judges", name, JUDGES)
        asked = [name for name in judges if name in _OF_OBJECTS]
        if asked and objects is None:
            raise ValueError(f"the judges {', '.join(asked)} need objects, boxes or masks of the pictures.")
        return list(judges)
    classes = len(torch.unique(targets)) if isinstance(targets, Tensor) else 0
    grids = [name for name, cells in (("grid_2x2", 4), ("grid_3x3", 9)) if classes >= cells]
    return [*grids, *(_OF_OBJECTS if objects is not None else ()), *_OF_MODELS]
