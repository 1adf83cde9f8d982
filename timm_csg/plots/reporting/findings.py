"""What the report tells, as numbers and tensors: one pass over the images, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg import metrics
from timm_csg.measuring import Measurement, measure
from timm_csg.model import is_differentiated
from timm_csg.numbers import NUMBERS, SUMMARY
from timm_csg.stage import Stage, find_stage

_MOST_HEAD_PASSES = 50  # classes; each costs one pass through a head that is not linear
_STRONGEST = 9
_SHOWN = [*SUMMARY, *(number.key for number in NUMBERS if number.gauge), "chance_agreement"]
SHARED = 0.5  # of a filter's largest entry: from here on a class counts as served, as in the authors' notebooks


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything the pages are made of.

    Attributes:
        numbers: As in ``metrics.json``; None where one does not apply. Also how many ``images``, ``classes`` and
            ``filters`` there are, the share ``most_frequent`` of the most frequent class, which guessing would get
            right, ``purity_best``, the largest possible purity of 20 images, ``information_floor``, the score with
            shuffled labels in words, and ``mean_classes``, how many classes a filter works for on average.
        stage: The last stage.
        targets: True classes [images].
        predictions: Predicted classes [images].
        confidence: Probability of the predicted class [images].
        responses: Mean response of each filter to each class [classes, filters]; NaN for classes without images.
        mutual: Mutual information [classes, filters], nats.
        gate: Class-filter matrix of the mechanism [classes, filters]; None without one.
        gate_name: ``"gate"``, or ``"category"`` where every filter is simply assigned a class (ICNN).
        owners: The class of each filter [filters]; -1 where a mechanism gave it none.
        silent: Filters that give the same response to every image [filters].
        strongest: Images that drive each filter most [filters, up to 9], strongest first.
        confusion: Number of images by true (row) and predicted (column) class.
        ablation: What removing a class's filters does; None where that would take too long.
        verdict: Whether the owners can be trusted; None without a class-filter matrix.
    """

    numbers: dict[str, Any]
    stage: Stage
    targets: Tensor
    predictions: Tensor
    confidence: Tensor
    responses: Tensor
    mutual: Tensor
    gate: Tensor | None
    gate_name: str
    owners: Tensor
    silent: Tensor
    strongest: Tensor
    confusion: Tensor
    ablation: metrics.Ablation | None
    verdict: metrics.Verdict | None

    @cached_property
    def strength(self) -> Tensor:
        """How much each filter serves each class, its largest entry 1 [classes, filters]."""
        matrix = self.mutual.float() if self.gate is None else self.gate
        peak = matrix.amax(dim=0, keepdim=True)
        return torch.where(peak > 0, matrix / peak.clamp_min(1e-12), torch.zeros_like(matrix))

    @cached_property
    def serves(self) -> Tensor:
        """Whether a filter serves a class with at least half of its strength [classes, filters]."""
        return (self.strength > SHARED) & ~self.silent

    @cached_property
    def order(self) -> Tensor:
        """Filters by owner, in a class by gate, then by mutual information; those without an owner come last."""
        matrix = self.mutual if self.gate is None else self.gate
        order = self.mutual.amax(dim=0).argsort(descending=True, stable=True)
        order = order[matrix.amax(dim=0)[order].argsort(descending=True, stable=True)]
        last = self.owners.masked_fill(self.owners < 0, len(self.mutual))
        return order[last[order].argsort(stable=True)]

    def filters_of(self, label: int) -> list[int]:
        """The filters that a class owns, those that reveal most about it first."""
        owned = ((self.owners == label) & ~self.silent).nonzero().flatten()
        return [int(index) for index in owned[self.mutual[label, owned].argsort(descending=True, stable=True)]]

    def count_owned(self, label: int) -> int:
        """How many filters a class owns, silent ones too."""
        return int((self.owners == label).sum())

    def serving_both(self, one: int, other: int) -> list[int]:
        """The filters that serve two classes."""
        return [int(index) for index in (self.serves[one] & self.serves[other]).nonzero().flatten()]

    def confusions(self) -> list[tuple[int, int, int]]:
        """True class, predicted class and number of images, most frequent first."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[: int((wrong > 0).sum())].tolist()
        pairs = [divmod(place, len(wrong)) for place in order]
        return [(label, taken, int(wrong[label, taken])) for label, taken in pairs]


def find_out(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], standard_accuracy: float | None = None
) -> Findings:
    """Look at a model: one pass over the images, more only where the head needs more than the pooled features.

    Args:
        model: A plain or differentiated timm classifier.
        loader: Yields (images, class indices), in a fixed order.
        standard_accuracy: Of a standard model on the same images, for the verdict; None: not known.

    Returns:
        The findings, all on the CPU.

    Raises:
        TypeError, ValueError: If the model or the data is not supported, see ``find_stage`` and ``measuring.collect``,
            or all images are of one class.
    """
    stage = find_stage(model)
    found = measure(model, loader, _SHOWN, standard_accuracy=standard_accuracy, most_passes=_MOST_HEAD_PASSES)
    subject, seen, classes = found.subject, found.subject.seen, found.subject.num_classes
    if len(seen.targets.unique()) < 2:
        raise ValueError(
            f"a report needs images of two classes or more, but all {len(seen.targets)} images are of class "
            f"{int(seen.targets[0])}: there is nothing to tell apart."
        )
    probability = seen.logits.softmax(dim=1)
    predictions = probability.argmax(dim=1)
    confusion = torch.bincount(seen.targets * classes + predictions, minlength=classes**2).view(classes, classes)
    totals = torch.zeros(classes, seen.features.shape[1], device="cpu").index_add_(0, seen.targets, seen.features)
    return Findings(
        numbers=_numbers(found, confusion),
        stage=stage,
        targets=seen.targets,
        predictions=predictions,
        confidence=probability.amax(dim=1),
        responses=totals / torch.bincount(seen.targets, minlength=classes)[:, None],
        mutual=subject.mutual,
        gate=subject.gate,
        gate_name="category" if _is_category(model) else "gate",
        owners=subject.owners,
        silent=seen.features.amax(dim=0) == seen.features.amin(dim=0),
        strongest=seen.features.argsort(dim=0, descending=True, stable=True)[:_STRONGEST].T.contiguous(),
        confusion=confusion,
        ablation=subject.removal,
        verdict=subject.verdict,
    )


def _numbers(found: Measurement, confusion: Tensor) -> dict[str, Any]:
    """What was measured, without the numbers that say nothing to a reader; and how many of what there are."""
    model, numbers = found.subject.model, dict(found.numbers)
    if is_differentiated(model) and (model.mechanism.needs_targets or model.mechanism.acts_without_targets):
        numbers["gated_accuracy"] = None  # the gated path is given the label, or it is the standard one
    if _is_category(model):
        numbers["gate_density"] = None
    classes, density, floor = len(confusion), numbers["gate_density"], numbers["mutual_information_score_floor"]
    per_class = confusion.sum(dim=1)
    return numbers | {
        "images": int(per_class.sum()),
        "classes": classes,
        "filters": found.subject.seen.features.shape[1],
        "most_frequent": float(per_class.max() / per_class.sum()),
        "purity_best": min(1.0, int(per_class.max()) / 20),
        "information_floor": "" if floor is None else f", {floor:.3f} with shuffled labels",
        "mean_classes": None if density is None else density * classes,
    }


def _is_category(model: nn.Module) -> bool:
    """Whether each filter is simply assigned a class (ICNN)."""
    return is_differentiated(model) and not model.mechanism.paths_differ
