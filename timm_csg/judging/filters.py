"""Judges of filters, each beside its floor: the same number on the same data with shuffled labels (or pictures)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.checks import whole
from timm_csg.judging.results import Judged, judged
from timm_csg.metrics._checks import check_features
from timm_csg.metrics.class_specificity import class_selectivity, purity
from timm_csg.metrics.filter_quality import class_independence, contrastiveness, mono_score, spatial_diversity


class _Given(NamedTuple):
    """What the numbers are computed from, with true or with shuffled labels."""

    features: Tensor
    targets: Tensor
    num_classes: int
    embeddings: Tensor | None


def judge_filters(
    features: Tensor,
    targets: Tensor,
    num_classes: int | None = None,
    *,
    used: Tensor | None = None,
    embeddings: Tensor | None = None,
    count: int = 20,
    most_fits: int = 64,
    seed: int = 0,
) -> dict[str, Judged]:
    """Purity@n, selectivity index, contrastiveness, class independence and MonoScore of filters, with their floors.

    The floor (``chance``) is the number that the same responses have when their labels are dealt out at random, and for
    MonoScore, which knows no labels, when the pictures of the encoder are. Contrastiveness looks at neither labels nor
    pictures: its floor is its value, so **it cannot tell a filter that knows something from one that does not**. The
    formulas and how each misleads are with their own functions in ``timm_csg.metrics``.

    Args:
        features: Pooled responses [samples, filters], floating point, finite, at least 2 samples.
        targets: Class indices [samples].
        num_classes: Number of classes; the largest target + 1 if left out.
        used: Which filters are judged, bool [filters]; None: all.
        embeddings: Of the same pictures by an encoder of your choice [samples, dimensions], for MonoScore.
        count: The n of purity@n; no more than there are samples.
        most_fits: Contrastiveness fits a mixture to every filter (0.1 s): at most so many, evenly spaced, are fitted;
            0: none, and no ``"contrastiveness"``.
        seed: Of the shuffling.

    Returns:
        By name: the mean over filters, its floor, and the value of every judged filter. Without
        ``"class_selectivity"`` where a response is negative, without ``"mono_score"`` where there are no embeddings.

    Raises:
        TypeError, ValueError: If features, targets or embeddings are not as stated, or no filter is used.

    Example:
        >>> features = torch.eye(3).repeat(8, 1)  # each filter responds to one class
        >>> found = judge_filters(features, torch.arange(24) % 3, count=8)
        >>> found["purity"].score, found["class_selectivity"].score, round(found["class_independence"].score, 3)
        (1.0, 1.0, 0.0)
    """
    check_features(features)
    if used is not None:
        features = features[:, used.to(features.device)]
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError("no filter is used, so there is none to judge; pass used=None for all filters.")
    if (-1 if whole(most_fits) is None else most_fits) < 0 or (whole(count) or 0) < 1:
        raise ValueError(
            f"count must be a whole number of at least 1, most_fits of at least 0, but they are {count!r} and "
            f"{most_fits!r}."
        )
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed), device="cpu").to(targets.device)
    classes = int(targets.max()) + 1 if num_classes is None else num_classes
    true = _Given(features, targets, classes, embeddings)
    shuffled = true._replace(
        targets=targets[order], embeddings=None if embeddings is None else embeddings[order.to(embeddings.device)]
    )
    count = min(count, len(targets))
    measures: dict[str, Callable[[_Given], Tensor]] = {
        "purity": lambda given: purity(given.features, given.targets, given.num_classes, count=count),
        "class_independence": lambda given: class_independence(given.features, given.targets, given.num_classes),
    }
    if bool((features >= 0).all()):
        measures["class_selectivity"] = lambda given: class_selectivity(*given[:3])
    if embeddings is not None:
        measures["mono_score"] = lambda given: mono_score(given.features, given.embeddings)  # type: ignore[arg-type]
    found = {name: judged(measure(true), measure(shuffled)) for name, measure in measures.items()}
    if not most_fits:
        return found
    rows = torch.linspace(0, features.shape[1] - 1, min(most_fits, features.shape[1]), device="cpu").round().long()
    clear = contrastiveness(features[:, rows.to(features.device)])
    return found | {"contrastiveness": judged(clear, clear)}


def judge_diversity(maps: Tensor, own: Tensor, targets: Tensor, *, seed: int = 0) -> Judged:
    """SID@k of the filters of each picture's class, beside that of another class's filters on the same picture.

    CHiQPM (Norrenbrock et al., NeurIPS 2025) reports it; see ``metrics.spatial_diversity``.

    Args:
        maps: Maps of all filters [samples, filters, height, width].
        own: The k filters of each class, for example the five with the largest weights, integers [classes, k].
        targets: Class of each picture, the predicted one in the papers [samples].
        seed: Of the shuffling of classes.

    Returns:
        Mean SID@k, its floor, and the value of each picture. Near the floor: the places are where filters of any class
        look, not what this class's filters have shared out among themselves.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> maps = torch.tensor([[[[9.0, 0.0, 0.0, 0.0, 0.0, 0.0]], [[9.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]])
        >>> round(judge_diversity(maps, torch.tensor([[0, 1]]), torch.tensor([0])).score, 3)  # one place
        0.5
    """
    if maps.ndim != 4 or own.ndim != 2 or len(maps) != len(targets) or int(targets.max()) >= len(own):
        raise ValueError(
            "maps must be [samples, filters, height, width], own [classes, k] and targets classes below their number "
            f"[samples], but the shapes are {list(maps.shape)}, {list(own.shape)} and {list(targets.shape)}."
        )
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed), device="cpu").to(targets.device)
    rows = torch.arange(len(maps), device=maps.device)[:, None]
    both = (
        spatial_diversity(maps[rows, own.to(maps.device)[given.to(maps.device)]]) for given in (targets, targets[order])
    )
    return judged(*both)
