"""Filters beside their floors, and explanation maps under their judges: what ``timm_csg.judging`` says of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_csg import explain, judging, metrics
from timm_csg.head import effective_weight, find_classifier
from timm_csg.hub_errors import explained
from timm_csg.judging.maps import Explain
from timm_csg.judging.parts import HALF_SIDE
from timm_csg.measuring.attacked import normalisation
from timm_csg.measuring.marked import read_for
from timm_csg.measuring.peaks import collect_peaks
from timm_csg.measuring.subject import Subject

_logger = logging.getLogger(__name__)
_BATCH, _MOST_MAPS = 32, 400  # pictures at a time; pictures whose maps of all filters are looked at
_MOST_PROBES = 50  # classes: one linear classifier is fitted for each
Answers = dict[str, judging.Judged]


def strongest_gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Largest absolute gradient over colours."""
    return explain.gradient(model, images, targets).abs().amax(dim=1)


MAPS: dict[str, Explain] = {
    "evidence_map": explain.evidence_map,
    "owner_map": explain.owner_map,
    "cam": explain.cam,
    "grad_cam": explain.grad_cam,
    "coarse_map": explain.coarse_map,
    "gradient": strongest_gradient,
    "centre": judging.centre_map,
    "edges": judging.edge_map,
    "noise": judging.noise_map,
}


def labelled(subject: Subject) -> Answers:
    """Numbers of owned filters that need nothing but responses and labels; none where no filter has an owner."""
    seen, used = subject.seen, subject.owners >= 0
    if not bool(used.any()):
        return {}
    options: dict[str, Any] = {"used": used, "most_fits": 0, "seed": subject.seed}
    return judging.judge_filters(seen.features, seen.targets, subject.num_classes, **options)


def fitted(subject: Subject) -> Answers:
    """Contrastiveness, and MonoScore where an encoder is named; none where no filter has an owner."""
    seen, used, name = subject.seen, subject.owners >= 0, subject.options.get("encoder")
    if not bool(used.any()):
        return {}
    embeddings = None
    if name:
        with explained(f"load the encoder {name}"):
            encoder = timm.create_model(name, pretrained=True, num_classes=0)
        encoder.to(next(subject.model.parameters()).device)
        embeddings = judging.embed(encoder, subject.batches(), **normalisation(subject.loader))
    options: dict[str, Any] = {"used": used, "embeddings": embeddings, "seed": subject.seed}
    return judging.judge_filters(seen.features, seen.targets, subject.num_classes, **options)


def relearning(subject: Subject) -> metrics.Relearning | None:
    """Probes fitted on every other image of a class, measured on the rest; None with many classes: a fit for each."""
    if subject.num_classes > _MOST_PROBES:
        return None
    features, targets = subject.seen.features, subject.seen.targets
    order = targets.argsort(stable=True)
    seen, held_out = order[::2], order[1::2]
    rest = (features[held_out], targets[held_out])
    return metrics.relearning(features[seen], targets[seen], subject.owned, rest, subject.num_classes)


def diversity(subject: Subject) -> judging.Judged | None:
    """SID@5 of the filters with the largest weights for the predicted class; None where a head has no such weights."""
    predicted = subject.seen.logits.argmax(dim=1)
    rows = torch.linspace(0, len(predicted) - 1, min(_MOST_MAPS, len(predicted)), device="cpu").round().long()
    images, _ = chosen_pictures(subject.batches(), rows)
    model, device = subject.model, next(subject.model.parameters()).device
    try:
        weight = effective_weight(find_classifier(model))[0]
        parts = [explain.filter_maps(model, part.to(device), upsample=False).cpu() for part in images.split(_BATCH)]
    except ValueError as error:  # tokens without a grid
        _logger.info("sid5: %s", error)
        return None
    maps = torch.cat(parts)
    if weight.shape[1] != maps.shape[1]:
        return None
    best = weight.topk(min(5, weight.shape[1]), dim=1).indices.cpu()
    return judging.judge_diversity(maps, best, predicted[rows], seed=subject.seed)


def parts(subject: Subject) -> Answers:
    """Consistency and stability of owned filters beside the landmarks."""
    points = read_for(subject, "landmarks").points
    if not bool((subject.owners >= 0).any()):
        return {}
    peaks = collect_peaks(subject.model, subject.batches())
    noisy = collect_peaks(subject.model, judging.with_noise(subject.batches(), seed=subject.seed))
    given = (points, peaks.targets, subject.owners)
    half_side = HALF_SIDE * min(peaks.image_size)
    return {
        "consistency": judging.part_consistency(peaks.place, *given, half_side=half_side),
        "stability": judging.part_stability(peaks.place, noisy.place, *given, half_side=half_side),
    }


def explanations(subject: Subject) -> dict[str, dict[str, dict[str, float]]]:
    """Every map that the model has, and three that know nothing, under every judge: score, chance, standard error."""
    total, model = len(subject.seen.targets), subject.model
    rows = torch.linspace(0, total - 1, min(subject.options["explanations"], total), device="cpu").round().long()
    images, targets = chosen_pictures(subject.batches(), rows)
    objects = read_for(subject, "boxes").object_boxes()[rows] if subject.options.get("boxes") else None
    if objects is not None and bool(objects.isnan().any(dim=1).all()):
        objects = None
    found = {}
    for name, maker in MAPS.items():
        try:
            maker(model, images[:1].to(next(model.parameters()).device), targets[:1])
        except ValueError as error:  # no grid, no linear head, no owners
            _logger.info("%s: %s", name, error)
            continue
        answers = _judged(maker, model, images, targets, objects, subject.seed)
        found[name] = {
            judge: {"score": one.score, "chance": one.chance, "standard_error": one.standard_error}
            for judge, one in answers.items()
        }
        subject.tick(len(images))
    return found


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


def _judged(
    maker: Explain, model: Any, images: Tensor, targets: Tensor, objects: Tensor | None, seed: int
) -> dict[str, judging.Judged]:
    """All judges; a grid that cannot be built is left out, and why is logged."""
    ask = partial(judging.judge, maker, model, images, targets, objects=objects, batch_size=_BATCH, seed=seed)
    found: dict[str, judging.Judged] = {}
    config = getattr(model, "pretrained_cfg", {})
    grids = {"shrink": bool(config.get("fixed_input_size"))}  # such models take nothing larger
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
