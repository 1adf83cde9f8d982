"""What the report tells, as numbers and tensors: one pass over the images, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg import measuring, metrics
from timm_csg.head import find_classifier
from timm_csg.model import is_differentiated
from timm_csg.stage import Stage, find_stage

_MOST_HEAD_PASSES = 50  # classes; each costs one pass through a head that is not linear
_STRONGEST = 9
SHARED = 0.5  # of a filter's largest entry: from here on a class counts as served, as in the authors' notebooks


@dataclass(frozen=True)
class Numbers:
    """The summary; shares from 0 to 1, mutual information in nats, None where a number does not apply.

    Attributes:
        images: How many were looked at.
        classes: Number of classes.
        filters: Number of filters.
        accuracy: Of the standard path.
        gated_accuracy: Of the gated path; None also where that path is given the true label, or is the standard one.
        mutual_information_score: MIS.
        mutual_information_bound: Its largest possible value.
        gate_density: Mean gate; None where filters have a category instead.
        owner_agreement: Share of filters whose owner by the gate is the class they tell most about.
        chance_agreement: The same for owners dealt out at random, as many filters for each class.
        strongest_of_owner: Among the images that drive a filter most, the share that shows its owner.
        class_without_its_filters: Accuracy of a class after its filters are removed, mean over classes.
        other_classes: Accuracy of the other classes meanwhile.
    """

    images: int
    classes: int
    filters: int
    accuracy: float
    gated_accuracy: float | None
    mutual_information_score: float
    mutual_information_bound: float
    gate_density: float | None
    owner_agreement: float | None
    chance_agreement: float | None
    strongest_of_owner: float
    class_without_its_filters: float | None
    other_classes: float | None

    @property
    def classes_per_filter(self) -> float | None:
        """How many classes a filter works for, on average; None where filters have a category instead."""
        return None if self.gate_density is None else self.gate_density * self.classes


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything the pages are made of.

    Attributes:
        numbers: The summary.
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

    numbers: Numbers
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

    @property
    def most_frequent(self) -> float:
        """Share of the most frequent class, which guessing would get right."""
        return float(self.confusion.sum(dim=1).max() / self.confusion.sum())

    @cached_property
    def order(self) -> Tensor:
        """Filters by owner, in a class by gate, then by mutual information; those without an owner come last."""
        matrix = self.mutual if self.gate is None else self.gate
        order = self.mutual.amax(dim=0).argsort(descending=True, stable=True)
        order = order[matrix.amax(dim=0)[order].argsort(descending=True, stable=True)]
        last = self.owners.masked_fill(self.owners < 0, len(self.mutual))
        return order[last[order].argsort(stable=True)]

    def filters_of(self, label: int) -> list[int]:
        """The filters that a class owns, those that tell most about it first."""
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
    """Look at a model: one pass over the images, more only where the head is not linear.

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
    seen = measuring.collect(model, loader)
    classes = int(model.num_classes)  # type: ignore[arg-type]
    if len(seen.targets.unique()) < 2:
        raise ValueError(
            f"a report needs images of two classes or more, but all {len(seen.targets)} images are of class "
            f"{int(seen.targets[0])}: there is nothing to tell apart."
        )
    mutual = metrics.mutual_information(seen.features, seen.targets, classes)
    gate = model.mechanism.class_filter_matrix() if is_differentiated(model) else None
    gate = None if gate is None else gate.detach().float().cpu()
    owners = metrics.owners(mutual if gate is None else gate)
    if gate is not None:
        owners = owners.masked_fill(gate.amax(dim=0) <= 0, -1)
    silent = seen.features.amax(dim=0) == seen.features.amin(dim=0)
    strongest = seen.features.argsort(dim=0, descending=True, stable=True)[:_STRONGEST].T.contiguous()
    probability = seen.logits.softmax(dim=1)
    predictions = probability.argmax(dim=1)
    ablation = _ablation(model, loader, seen, owners, classes)
    confusion = torch.bincount(seen.targets * classes + predictions, minlength=classes**2).view(classes, classes)
    totals = torch.zeros(classes, seen.features.shape[1]).index_add_(0, seen.targets, seen.features)
    numbers = _numbers(model, seen, mutual, gate, owners, silent, strongest, ablation)
    verdict = None
    if gate is not None:
        verdict = metrics.verdict(
            gate,
            seen.features,
            seen.targets,
            accuracy=numbers.accuracy,
            removal=ablation,
            standard_accuracy=standard_accuracy,
        )
    return Findings(
        numbers=numbers,
        stage=stage,
        targets=seen.targets,
        predictions=predictions,
        confidence=probability.amax(dim=1),
        responses=totals / torch.bincount(seen.targets, minlength=classes)[:, None],
        mutual=mutual,
        gate=gate,
        gate_name="gate" if gate is None or model.mechanism.paths_differ else "category",  # type: ignore[union-attr]
        owners=owners,
        silent=silent,
        strongest=strongest,
        confusion=confusion,
        ablation=ablation,
        verdict=verdict,
    )


def _numbers(
    model: nn.Module,
    seen: measuring.Activations,
    mutual: Tensor,
    gate: Tensor | None,
    owners: Tensor,
    silent: Tensor,
    strongest: Tensor,
    ablation: metrics.Ablation | None,
) -> Numbers:
    gated = seen.gated_logits
    # With labels the gated path says nothing, and with a mask that always acts it is the standard one.
    uses_labels = is_differentiated(model) and (model.mechanism.needs_targets or model.mechanism.acts_without_targets)
    has_gate = is_differentiated(model) and model.mechanism.paths_differ
    hits = (seen.targets[strongest] == owners[:, None])[~silent & (owners >= 0)]
    return Numbers(
        images=len(seen.targets),
        classes=mutual.shape[0],
        filters=mutual.shape[1],
        accuracy=metrics.accuracy(seen.logits, seen.targets),
        gated_accuracy=None if gated is None or uses_labels else metrics.accuracy(gated, seen.targets),
        mutual_information_score=float(metrics.mutual_information_score(mutual)),
        mutual_information_bound=float(metrics.mutual_information_bound(seen.targets, mutual.shape[0]).max()),
        gate_density=float(metrics.gate_density(gate)) if gate is not None and has_gate else None,
        owner_agreement=None if gate is None else float(metrics.owner_agreement(gate, mutual)),
        chance_agreement=None if gate is None else _chance_agreement(owners, mutual),
        strongest_of_owner=float(hits.double().mean()) if hits.numel() else 0.0,
        class_without_its_filters=None if ablation is None else ablation.own,
        other_classes=None if ablation is None else ablation.others,
    )


def _chance_agreement(owners: Tensor, mutual: Tensor) -> float:
    """How often an owner and a measured class agree when the filters are shuffled among the owners."""
    labels = (owners[owners >= 0], mutual.argmax(dim=0))
    shares = [torch.bincount(each, minlength=len(mutual)) / max(1, len(each)) for each in labels]
    return float(shares[0] @ shares[1])


@torch.no_grad()
def _ablation(
    model: nn.Module, loader: Any, seen: measuring.Activations, owners: Tensor, classes: int
) -> metrics.Ablation | None:
    """``measuring.ablate``; where the logits are linear in the pooled features, from these, without another pass."""
    weight, bias = _linear_head(model, seen)
    if weight is None:
        return measuring.ablate(model, loader, owners, classes) if classes <= _MOST_HEAD_PASSES else None
    count = torch.bincount(seen.targets, minlength=classes).double()
    rows = []
    for removed in range(-1, classes):
        kept = owners != removed
        hits = (seen.features[:, kept] @ weight[:, kept].T + bias).argmax(dim=1) == seen.targets
        rows.append(torch.bincount(seen.targets, weights=hits.double(), minlength=classes) / count)
    return metrics.Ablation(before=rows[0], after=torch.stack(rows[1:]))


def _linear_head(model: nn.Module, seen: measuring.Activations) -> tuple[Tensor | None, Tensor | float]:
    """Classifier weight [classes, filters] and bias, if they give the logits that were seen."""
    classifier = find_classifier(model)
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.flatten(1).shape != (seen.logits.shape[1], seen.features.shape[1]):
        return None, 0.0
    weight = weight.detach().flatten(1).float().cpu()
    bias = 0.0 if classifier.bias is None else classifier.bias.detach().float().cpu()
    expected = seen.features[:64] @ weight.T + bias
    fits = torch.allclose(expected, seen.logits[:64], rtol=1e-3, atol=1e-3 * float(seen.logits[:64].abs().max()))
    return (weight, bias) if fits else (None, 0.0)
