"""How every number is computed: a function of a ``Subject`` for each key, None where the number does not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_csg import metrics
from timm_csg.measuring.attacked import attacked
from timm_csg.measuring.judged import diversity, explanations, fitted, labelled, parts, relearning
from timm_csg.measuring.marked import instability, interpretability, localisation, read_for
from timm_csg.measuring.stage_weights import stage_weight
from timm_csg.measuring.subject import Subject
from timm_csg.model import is_differentiated

_MOST_ESTIMATES = 5e8  # values of all halves together that the interval of the MIS may take
MOST_RATED = 3
"""Classes up to which sensitivity and specificity are among the numbers; the table by class always has them."""
Measure = Callable[[Subject], Any]


def _gated_accuracy(subject: Subject) -> float | None:
    logits = subject.seen.gated_logits
    return None if logits is None else metrics.accuracy(logits, subject.seen.targets)


def _uses_labels(subject: Subject) -> bool | None:
    model = subject.model
    return model.mechanism.needs_targets if is_differentiated(model) else None


def _class_rates(subject: Subject) -> metrics.ClassRates:
    return metrics.class_rates(subject.seen.logits, subject.seen.targets, subject.num_classes)


def _rates(subject: Subject, name: str) -> list[list[float] | None] | None:
    """Share, low and high end for each class, None for one without images; None for more than three classes."""
    if subject.num_classes > MOST_RATED:
        return None
    found = subject.once(_class_rates)
    shares, intervals = getattr(found, name), getattr(found, f"{name}_interval")
    rows = [[share, *ends] for share, ends in zip(shares.tolist(), intervals.tolist(), strict=True)]
    return [None if row[0] != row[0] else row for row in rows]


def _score_interval(subject: Subject) -> list[float] | None:
    seen = subject.seen
    resamples = min(100, int(_MOST_ESTIMATES // max(seen.features.numel(), 1)))
    if resamples < 10 or int(_images(subject).min()) < 4:
        return None
    options: dict[str, Any] = {"resamples": resamples, "random_state": subject.seed}
    found = metrics.mutual_information_score_interval(seen.features, seen.targets, subject.num_classes, **options)
    return [float(found.low), float(found.high)]


def _score_floor(subject: Subject) -> float | None:
    if subject.seen.features.numel() > _MOST_ESTIMATES / 10:  # with so many images the noise is far below the score
        return None

    def score(targets: Tensor) -> Tensor:
        mutual = metrics.mutual_information(subject.seen.features, targets, subject.num_classes)
        return metrics.mutual_information_score(mutual)

    return metrics.noise_floor(score, subject.seen.targets, shuffles=1, random_state=subject.seed).mean


def _of_gate(function: Callable[[Tensor], Tensor]) -> Measure:
    return lambda subject: None if subject.gate is None else function(subject.gate)


def _with_mutual(function: Callable[[Tensor, Tensor], Tensor | float]) -> Measure:
    return lambda subject: None if subject.gate is None else function(subject.gate, subject.mutual)


def _of_owned(subject: Subject, values: Tensor | None) -> Tensor | None:
    """The mean over the filters that a class owns."""
    return None if values is None else values[subject.owners >= 0].mean()


def _purity(subject: Subject) -> Tensor:
    seen = subject.seen
    return metrics.purity(seen.features, seen.targets, subject.num_classes, count=min(20, len(seen.targets)))


def _selectivity(subject: Subject) -> Tensor | None:
    seen = subject.seen
    is_defined = bool((seen.features >= 0).all())
    return metrics.class_selectivity(seen.features, seen.targets, subject.num_classes) if is_defined else None


def _part(found: Any, name: str) -> Any:
    """An attribute of what was found; None where nothing was."""
    return None if found is None else getattr(found, name)


def _mean_of(found: Any, name: str) -> float | None:
    return None if found is None else float(getattr(found, name).nanmean())


def _weight_similarity(subject: Subject) -> metrics.SimilaritySummary | None:
    try:
        weight = stage_weight(subject.model).weight
    except ValueError:  # no layer with one output for each filter
        return None
    return metrics.summarize_similarity(metrics.weight_similarity(weight).cpu(), subject.owners)


def _activation_similarity(subject: Subject) -> metrics.SimilaritySummary:
    return metrics.summarize_similarity(metrics.activation_similarity(subject.seen.features), subject.owners)


def _images(subject: Subject) -> Tensor:
    return torch.bincount(subject.seen.targets, minlength=subject.num_classes)


def _own_class(subject: Subject, found: Any) -> Tensor | None:
    """Values of each filter on the class that owns it [filters]."""
    return None if found is None else found.by_owner(subject.owners)


def _mean(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.nanmean()


def _map_score(method: str, name: str) -> Measure:
    return lambda subject: _part(subject.once(localisation).get(method), name)


def _judged(of: Callable[[Subject], Any], name: str) -> Measure:
    return lambda subject: _part(subject.once(of).get(name), "score")


def _floor(of: Callable[[Subject], Any], name: str) -> Measure:
    return lambda subject: _part(subject.once(of).get(name), "chance")


MEASURES: dict[str, Measure] = {
    "accuracy": lambda s: metrics.accuracy(s.seen.logits, s.seen.targets),
    "gated_accuracy": _gated_accuracy,
    "gated_accuracy_uses_labels": _uses_labels,
    "accuracy_interval": lambda s: list(metrics.accuracy_interval(s.seen.logits, s.seen.targets)[1:]),
    "sensitivity": lambda s: _rates(s, "sensitivity"),
    "specificity": lambda s: _rates(s, "specificity"),
    "mutual_information_score": lambda s: metrics.mutual_information_score(s.mutual),
    "mutual_information_score_interval": _score_interval,
    "mutual_information_score_floor": _score_floor,
    "mutual_information_bound": lambda s: metrics.mutual_information_bound(s.seen.targets, s.num_classes).max(),
    "gate_density": _of_gate(metrics.gate_density),
    "gate_binarity": _of_gate(metrics.binarity),
    "classes_per_filter": _of_gate(lambda gate: metrics.classes_per_filter(gate).double().mean()),
    "owner_agreement": _with_mutual(metrics.owner_agreement),
    "chance_agreement": _with_mutual(metrics.chance_agreement),
    "purity": lambda s: _of_owned(s, s.once(_purity)),
    "strongest_show_owner": lambda s: metrics.owner_purity(s.seen.features, s.seen.targets, s.owners),
    "purity_floor": _floor(labelled, "purity"),
    "class_selectivity": lambda s: _of_owned(s, _selectivity(s)),
    "class_selectivity_floor": _floor(labelled, "class_selectivity"),
    "class_independence": _judged(labelled, "class_independence"),
    "class_independence_floor": _floor(labelled, "class_independence"),
    "filter_owners_by": lambda s: "mutual information" if s.gate is None else "gate",
    "filters_per_class": lambda s: s.owned.sum(dim=1).tolist(),
    "class_without_its_filters": lambda s: _part(s.removal, "own"),
    "other_classes": lambda s: _part(s.removal, "others"),
    "class_with_only_its_filters": lambda s: _part(s.isolation, "own"),
    "other_classes_with_only_its_filters": lambda s: _part(s.isolation, "others"),
    "owners_trusted": lambda s: _part(s.verdict, "trusted"),
    "verdict": lambda s: _part(s.verdict, "sentence"),
    "verdict_advice": lambda s: _part(s.verdict, "advice"),
    "weight_similarity_within": lambda s: _part(s.once(_weight_similarity), "within"),
    "weight_similarity_across": lambda s: _part(s.once(_weight_similarity), "across"),
    "activation_similarity_within": lambda s: s.once(_activation_similarity).within,
    "activation_similarity_across": lambda s: s.once(_activation_similarity).across,
    "contrastiveness": _judged(fitted, "contrastiveness"),
    "relearnt_class": lambda s: _mean_of(s.once(relearning), "after"),
    "relearnt_class_before": lambda s: _mean_of(s.once(relearning), "before"),
    "mono_score": _judged(fitted, "mono_score"),
    "mono_score_floor": _floor(fitted, "mono_score"),
    "sid5": lambda s: _part(s.once(diversity), "score"),
    "sid5_floor": lambda s: _part(s.once(diversity), "chance"),
    "explanations": lambda s: s.once(explanations),
    "part_consistency": _judged(parts, "consistency"),
    "part_consistency_floor": _floor(parts, "consistency"),
    "part_stability": _judged(parts, "stability"),
    "part_stability_floor": _floor(parts, "stability"),
    "location_instability": lambda s: _mean(s.once(instability).per_class),
    "location_instability_own_class": lambda s: _mean(_own_class(s, s.once(instability))),
    "silent_filters": lambda s: s.once(instability).silent,
    "landmarks": lambda s: list(read_for(s, "landmarks").point_names),
    "part_interpretability": lambda s: _mean(_part(s.once(interpretability), "per_class")),
    "part_interpretability_own_class": lambda s: _mean(_own_class(s, s.once(interpretability))),
    "part_field_diameter": lambda s: _part(s.once(interpretability), "diameter"),
    **{
        f"{m}_{x}": _map_score(m, f"total_{x}") for m in ("gradmap", "activmap", "cam") for x in ("iou", "ap20", "ap30")
    },
    "whole_image_iou": lambda s: s.once(localisation)["whole_image"].total_iou,
    "adversarial": lambda s: s.once(attacked),
    "adversarial_images": lambda s: min(len(s.seen.targets), s.options["attack_images"]),
}


def _path_accuracy(subject: Subject, logits: Tensor | None) -> Tensor | None:
    targets, classes = subject.seen.targets, subject.num_classes
    return None if logits is None else metrics.accuracy_per_class(logits, targets, classes)


def _map_iou(subject: Subject, method: str) -> Tensor | None:
    found = subject.once(localisation).get(method)
    if found is None:
        return None
    column = torch.full((subject.num_classes,), torch.nan, device="cpu")
    column[: len(found.iou)] = found.iou
    return column


def _after(found: metrics.Ablation | None) -> Tensor | None:
    return None if found is None else found.after.diagonal()


# Columns of the tables by class and by filter: name, the group of numbers they belong to, values (None: no column).
CLASS_COLUMNS: tuple[tuple[str, str, Measure], ...] = (
    ("images", "", _images),
    ("accuracy", "accuracy", lambda s: _path_accuracy(s, s.seen.logits)),
    ("gated_accuracy", "accuracy", lambda s: _path_accuracy(s, s.seen.gated_logits)),
    ("specificity", "accuracy", lambda s: s.once(_class_rates).specificity),
    ("mutual_information", "information", lambda s: metrics.mutual_information_per_class(s.mutual).best),
    (
        "mutual_information_bound",
        "information",
        lambda s: metrics.mutual_information_bound(s.seen.targets, s.num_classes),
    ),
    ("filters", "gate", lambda s: s.owned.sum(dim=1)),
    ("density", "gate", _of_gate(lambda gate: gate.mean(dim=1))),
    ("accuracy_without_its_filters", "ablation", lambda s: _after(s.removal)),
    ("accuracy_with_only_its_filters", "ablation", lambda s: _after(s.isolation)),
    ("location_instability", "parts", lambda s: s.once(instability).per_class),
    ("part_interpretability", "parts", lambda s: _part(s.once(interpretability), "per_class")),
    ("gradmap_iou", "localisation", lambda s: _map_iou(s, "gradmap")),
    ("activmap_iou", "localisation", lambda s: _map_iou(s, "activmap")),
    ("cam_iou", "localisation", lambda s: _map_iou(s, "cam")),
)
FILTER_COLUMNS: tuple[tuple[str, str, Measure], ...] = (
    ("told_class", "information", lambda s: metrics.mutual_information_per_filter(s.mutual).best_class),
    ("mutual_information", "information", lambda s: metrics.mutual_information_per_filter(s.mutual).best),
    ("selectivity", "information", lambda s: metrics.mutual_information_per_filter(s.mutual).selectivity),
    ("owner", "gate", lambda s: s.owners),
    ("purity", "gate", lambda s: s.once(_purity)),
    ("strength", "gate", _of_gate(lambda gate: gate.amax(dim=0))),
    ("classes", "gate", _of_gate(metrics.classes_per_filter)),
    ("location_instability", "parts", lambda s: _own_class(s, s.once(instability))),
    ("part_interpretability", "parts", lambda s: _own_class(s, s.once(interpretability))),
)
