"""``timm-csg evaluate --explanations`` and ``--encoder``: judges of maps and of filters on a model's pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from timm_csg import explain, judging, metrics
from timm_csg.cli.measures_optional import read_for
from timm_csg.head import effective_weight, find_classifier
from timm_csg.judging.maps import Explain
from timm_csg.judging.parts import HALF_SIDE

_logger = logging.getLogger(__name__)
_BATCH, _MOST_MAPS = 32, 400  # pictures at a time; pictures whose maps of all filters are looked at
_LABELS = {
    "grid_2x2": "grid 2x2",
    "grid_3x3": "grid 3x3",
    "deletion": "deletion ↓",
    "insertion": "insertion",
    "pointing_game": "pointing",
    "energy_inside": "energy",
    "plausibility": "plausible",
    "stability": "stable",
    "weight_randomisation": "weights ↓",
    "random_logit": "class ↓",
}
Tick = Callable[[int], None]


def strongest_gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Largest absolute gradient over colours."""
    return explain.gradient(model, images, targets).abs().amax(dim=1)


MAPS: dict[str, Explain] = {
    "evidence_map": explain.evidence_map,
    "cam": explain.cam,
    "grad_cam": explain.grad_cam,
    "coarse_map": explain.coarse_map,
    "gradient": strongest_gradient,
    "centre": judging.centre_map,
    "edges": judging.edge_map,
    "noise": judging.noise_map,
}


def judge_explanations(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    boxes: Tensor | None = None,
    total: int,
    images: int = 200,
    seed: int = 0,
    tick: Tick = lambda images: None,
) -> dict[str, dict[str, Any]]:
    """Every map that the model has, and three that know nothing, under every judge that can judge here.

    Args:
        model: In eval mode; left as found.
        loader: Yields (images, class indices), in the same order every time.
        boxes: Of the objects in pixels of the images [total, 4], for three more judges.
        total: Pictures that the loader yields.
        images: Pictures that are judged, at most, spread evenly.
        seed: Of everything random.
        tick: Called with the number of pictures after each map.

    Returns:
        By map and judge: ``score``, ``chance``, ``standard_error``.
    """
    rows = torch.linspace(0, total - 1, min(images, total)).round().long()
    pictures, targets = chosen_pictures(loader, rows)
    objects = None if boxes is None or bool(boxes[rows].isnan().any(dim=1).all()) else boxes[rows]
    found: dict[str, dict[str, Any]] = {}
    for name, maker in MAPS.items():
        try:
            maker(model, pictures[:1].to(next(model.parameters()).device), targets[:1])
        except ValueError as error:  # no grid, no linear head, no owners
            _logger.info("%s: %s", name, error)
            continue
        found[name] = {
            judge: {"score": one.score, "chance": one.chance, "standard_error": one.standard_error}
            for judge, one in _judged(maker, model, pictures, targets, objects, seed).items()
        }
        tick(len(pictures))
    return found


def judge_the_filters(
    model: Any,
    loader: Iterable[tuple[Tensor, Tensor]],
    features: Tensor,
    targets: Tensor,
    predicted: Tensor,
    num_classes: int,
    *,
    used: Tensor,
    encoder: str | None = None,
    normalisation: tuple[list[float] | None, list[float] | None] = (None, None),
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """The numbers of filters with their floors: ``score`` and ``floor`` by name.

    Args:
        model: In eval mode; left as found.
        loader: Yields the pictures of ``features``, in their order.
        features: Pooled responses [samples, filters].
        targets: [samples].
        predicted: Classes that the model says [samples], for SID@5.
        num_classes: Number of classes.
        used: Which filters have an owner, bool [filters].
        encoder: Name of a timm model for MonoScore; None: no MonoScore.
        normalisation: Mean and deviation of the loader's images.
        seed: Of the shuffling.
    """
    embeddings = None
    if encoder is not None:
        network = timm.create_model(encoder, pretrained=True, num_classes=0)
        mean, std = normalisation
        embeddings = judging.embed(network.to(next(model.parameters()).device), loader, mean=mean, std=std)
    found = judging.judge_filters(features, targets, num_classes, used=used, embeddings=embeddings, seed=seed)
    diversity = _diversity(model, loader, predicted, seed)
    found |= {} if diversity is None else {"sid5": diversity}
    return {name: {"score": one.score, "floor": one.chance} for name, one in found.items()}


def chosen_pictures(loader: Iterable[tuple[Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures of some rows and their classes, on the CPU."""
    wanted, start = set(rows.tolist()), 0
    kept: list[tuple[Tensor, Tensor]] = []
    for images, targets in loader:
        here = [index for index in range(len(targets)) if start + index in wanted]
        kept.append((images[here].cpu(), targets[here].cpu()))
        start += len(targets)
    images, targets = (torch.cat(column) for column in zip(*kept, strict=True))
    return images, targets


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Of the maps and filters that were judged: the scores of all models, behind them what chance has."""
    models = results["checkpoints"]
    if any(found.get("explanations") for found in models.values()):
        judges = [name for name in _LABELS if any(name in one for found in models.values() for one in _maps(found))]
        table = Table(
            "model", "map", *(_LABELS[name] for name in judges), title="explanation maps (chance in brackets)"
        )
        for label, found in models.items():
            for name, answers in found["explanations"].items():
                table.add_row(label, name, *(_cell(answers.get(judge), "chance") for judge in judges))
        yield table
    if any(found.get("filters_judged") for found in models.values()):
        names = list(dict.fromkeys(name for found in models.values() for name in found["filters_judged"]))
        table = Table("model", *names, title="filters (with shuffled labels in brackets)")
        for label, found in models.items():
            table.add_row(label, *(_cell(found["filters_judged"].get(name), "floor") for name in names))
        yield table


def judge_subject(subject: Any, explanations: int, filters: bool, encoder: str | None) -> dict[str, Any]:
    """What metrics.json holds of a measured model under ``explanations`` and ``filters_judged``."""
    model, loader, seen = subject.model, subject.loader, subject.seen
    found: dict[str, Any] = {}
    if explanations:
        path = subject.options.get("boxes")
        boxes = read_for(subject, path).object_boxes() if path else None
        total, seed = len(seen.targets), subject.seed
        found["explanations"] = judge_explanations(
            model, loader, boxes=boxes, total=total, images=explanations, seed=seed, tick=subject.tick
        )
    if filters or encoder:
        found["filters_judged"] = judge_the_filters(
            model,
            loader,
            seen.features,
            seen.targets,
            seen.logits.argmax(dim=1),
            subject.num_classes,
            used=subject.owned.any(dim=0),
            encoder=encoder,
            normalisation=subject.normalisation,
            seed=subject.seed,
        )
        if subject.options.get("landmarks"):
            points = read_for(subject, subject.options["landmarks"]).points
            owners = torch.where(subject.owned.any(dim=0), subject.owners, -1)
            found["filters_judged"] |= judge_parts(model, loader, points, owners, subject.seed)
    return found


def judge_parts(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], points: Tensor, owners: Tensor, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Consistency and stability of parts, with their floors; nothing for models without a map.

    Args:
        model: In eval mode; left as found.
        loader: Yields (images, class indices), in the same order every time.
        points: Landmarks of the pictures [samples, parts, 2].
        owners: Class of each filter, -1 for none [filters].
        seed: Of the noise.
    """
    try:
        peaks = metrics.collect_peaks(model, loader)
        noisy = metrics.collect_peaks(model, judging.with_noise(loader, seed=seed))
    except ValueError as error:  # tokens
        _logger.info("parts: %s", error)
        return {}
    half_side = HALF_SIDE * min(peaks.image_size)
    given = (points, peaks.targets, owners)
    found = {
        "part_consistency": judging.part_consistency(peaks.place, *given, half_side=half_side),
        "part_stability": judging.part_stability(peaks.place, noisy.place, *given, half_side=half_side),
    }
    return {name: {"score": one.score, "floor": one.chance} for name, one in found.items()}


def _maps(found: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (found.get("explanations") or {}).values()


def _cell(answer: dict[str, float] | None, floor: str) -> str:
    return "–" if answer is None else f"{answer['score']:.2f} ({answer[floor]:.2f})"


def _judged(
    maker: Explain, model: nn.Module, images: Tensor, targets: Tensor, objects: Tensor | None, seed: int
) -> dict[str, judging.Judged]:
    """All judges; a grid that cannot be built is left out, and why is logged."""
    ask = partial(judging.judge, maker, model, images, targets, objects=objects, batch_size=_BATCH, seed=seed)
    found: dict[str, judging.Judged] = {}
    model_config: Any = getattr(model, "pretrained_cfg", {})
    grids = {"shrink": bool(model_config.get("fixed_input_size"))}  # such models take nothing larger
    for name, cells in (("grid_2x2", 4), ("grid_3x3", 9)):
        if len(targets.unique()) < cells:
            continue
        try:
            found |= ask(judges=[name], options={name: grids})
        except ValueError as error:  # too few pictures that the model is sure of
            _logger.info("%s: %s", name, error)
    others = [name for name in judging.JUDGES if not name.startswith("grid")]
    if objects is None:
        others = [name for name in others if name not in ("pointing_game", "energy_inside", "plausibility")]
    return found | ask(judges=others)


def _diversity(model: Any, loader: Iterable[tuple[Tensor, Tensor]], predicted: Tensor, seed: int) -> Any:
    """SID@5 of the filters with the largest weights for the predicted class; None where a head has no such weights."""
    rows = torch.linspace(0, len(predicted) - 1, min(_MOST_MAPS, len(predicted))).round().long()
    images, _ = chosen_pictures(loader, rows)
    try:
        weight = effective_weight(find_classifier(model))[0]
        device = next(model.parameters()).device
        maps = torch.cat([explain.filter_maps(model, some.to(device), upsample=False) for some in images.split(_BATCH)])
        if weight.shape[1] != maps.shape[1]:
            return None
    except ValueError as error:  # tokens without a grid
        _logger.info("sid5: %s", error)
        return None
    best = weight.topk(min(5, weight.shape[1]), dim=1).indices
    return judging.judge_diversity(maps, best, predicted[rows], seed=seed)
