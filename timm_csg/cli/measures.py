"""What ``timm-csg evaluate`` measures: one function for each group of metrics, with the same keys for every model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg import measuring, metrics
from timm_csg.cli.data import Loader
from timm_csg.measuring import Activations
from timm_csg.model import is_differentiated
from timm_csg.stage import is_channels_last

_MOST_ESTIMATES = 5e8  # values of all halves together that the interval of the MIS may take


@dataclass
class Subject:
    """A model while it is measured, with what one pass over the data has given.

    Attributes:
        model: In eval mode.
        loader: The validation images, in order.
        class_names: One for each class.
        seen: Features, targets and logits of all images.
        seed: Of everything random.
        options: Files and attacks that groups need.
        tick: Called with the number of images that another pass has done.
        classes: Columns by class for the CSV file, filled by the measures.
        filters: Columns by filter.
    """

    model: nn.Module
    loader: Loader
    class_names: list[str]
    seen: Activations
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    tick: Callable[[int], None] = lambda images: None
    classes: dict[str, Tensor] = field(default_factory=dict)
    filters: dict[str, Tensor] = field(default_factory=dict)
    _mutual: Tensor | None = None

    def __post_init__(self) -> None:
        self.classes["images"] = torch.bincount(self.seen.targets, minlength=len(self.class_names))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def matrix(self) -> Tensor | None:
        """The mechanism's class-filter matrix on the CPU; None without a mechanism, or if it has none."""
        matrix = self.model.mechanism.class_filter_matrix() if is_differentiated(self.model) else None
        return None if matrix is None else matrix.detach().float().cpu()

    @property
    def mutual(self) -> Tensor:
        """Mutual information [classes, filters], computed when it is first asked for."""
        if self._mutual is None:
            self._mutual = metrics.mutual_information(
                self.seen.features, self.seen.targets, self.num_classes, random_state=self.seed
            )
        return self._mutual

    @property
    def owners(self) -> Tensor:
        """The class of each filter: by the mechanism, else the class it tells most about."""
        matrix = self.matrix
        return metrics.owners(self.mutual if matrix is None else matrix)

    @property
    def owned(self) -> Tensor:
        """Which filters are each class's own, bool [classes, filters]."""
        matrix = self.matrix
        return metrics.owned_filters(self.mutual if matrix is None else matrix)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images as the model gets them."""
        images, _ = next(iter(self.loader))
        return int(images.shape[2]), int(images.shape[3])

    @property
    def normalisation(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and deviation that the loader normalises with; None where it does not say."""
        transform: Any = getattr(getattr(self.loader, "dataset", None), "transform", None)
        for step in getattr(transform, "transforms", ()):
            if hasattr(step, "mean") and hasattr(step, "std"):
                mean, std = (torch.as_tensor(values).flatten().tolist() for values in (step.mean, step.std))
                return mean, std
        return None, None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Another pass over the images."""
        for images, targets in self.loader:
            yield images, targets
            self.tick(len(targets))


def measure_accuracy(subject: Subject) -> dict[str, Any]:
    """Accuracy of both paths, together and by class."""
    seen = subject.seen
    subject.classes["accuracy"] = _by_class(seen.logits, seen.targets, subject.num_classes)
    result: dict[str, Any] = {"accuracy": metrics.accuracy(seen.logits, seen.targets)}
    if is_differentiated(subject.model) and seen.gated_logits is not None:
        subject.classes["gated_accuracy"] = _by_class(seen.gated_logits, seen.targets, subject.num_classes)
        result["gated_accuracy"] = metrics.accuracy(seen.gated_logits, seen.targets)
        result["gated_accuracy_uses_labels"] = subject.model.mechanism.needs_targets
    return result


def measure_information(subject: Subject) -> dict[str, Any]:
    """Mutual information between filters and classes, its score with bound and 95 % interval."""
    per_class = metrics.mutual_information_per_class(subject.mutual)
    per_filter = metrics.mutual_information_per_filter(subject.mutual)
    bound = metrics.mutual_information_bound(subject.seen.targets, subject.num_classes)
    subject.classes |= {"mutual_information": per_class.best, "mutual_information_bound": bound}
    subject.filters |= {"told_class": per_filter.best_class, "mutual_information": per_filter.best}
    subject.filters["selectivity"] = per_filter.selectivity
    result: dict[str, Any] = {
        "mutual_information_score": float(metrics.mutual_information_score(subject.mutual)),
        "mutual_information_bound": float(bound.max()),
    }
    resamples = min(100, int(_MOST_ESTIMATES // max(subject.seen.features.numel(), 1)))
    if resamples >= 10 and int(subject.classes["images"].min()) >= 4:
        interval = metrics.mutual_information_score_interval(
            subject.seen.features,
            subject.seen.targets,
            subject.num_classes,
            resamples=resamples,
            random_state=subject.seed,
        )
        result["mutual_information_score_interval"] = [float(interval.low), float(interval.high)]
    return result


def measure_gate(subject: Subject) -> dict[str, Any]:
    """What the class-filter matrix says, and whether the activations agree."""
    matrix, seen = subject.matrix, subject.seen
    subject.filters["owner"] = torch.where(subject.owned.any(dim=0), subject.owners, -1)
    counts = subject.owned.sum(dim=1)
    subject.classes["filters"] = counts
    purity = metrics.purity(seen.features, seen.targets, subject.num_classes, count=min(20, len(seen.targets)))
    subject.filters["purity"] = purity
    result: dict[str, Any] = {
        "filter_owners_by": "mutual information" if matrix is None else "gate",
        "filters_per_class": counts.tolist(),
        "purity": float(purity[subject.owned.any(dim=0)].mean()),
    }
    if bool((seen.features >= 0).all()):
        selectivity = metrics.class_selectivity(seen.features, seen.targets, subject.num_classes)
        result["class_selectivity"] = float(selectivity[subject.owned.any(dim=0)].mean())
    if matrix is None:
        return result
    subject.filters["strength"] = matrix.amax(dim=0)
    subject.filters["classes"] = metrics.classes_per_filter(matrix)
    subject.classes["density"] = matrix.mean(dim=1)
    return result | {
        "gate_density": float(metrics.gate_density(matrix)),
        "gate_binarity": float(metrics.binarity(matrix)),
        "classes_per_filter": float(metrics.classes_per_filter(matrix).double().mean()),
        "owner_agreement": float(metrics.owner_agreement(matrix, subject.mutual)),
    }


def _by_class(logits: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Accuracy of each class [classes], NaN without images."""
    hits = (logits.argmax(dim=1) == targets).double()
    return torch.bincount(targets, weights=hits, minlength=num_classes) / torch.bincount(targets, minlength=num_classes)


def measure_ablation(subject: Subject) -> dict[str, Any]:
    """Accuracy without the filters of a class, and with these alone; the class's own and the others."""
    result: dict[str, Any] = {}
    for keep_only in (False, True):
        model, batches = _head_on_pooled(subject)
        ablation = measuring.ablate(model, batches, subject.owned, subject.num_classes, keep_only=keep_only)
        name = "with_only_its_filters" if keep_only else "without_its_filters"
        subject.classes[f"accuracy_{name}"] = ablation.after.diagonal()
        result |= {f"class_{name}": ablation.own, f"other_classes_{name}": ablation.others}
        if subject.matrix is not None and not keep_only:
            accuracy = metrics.accuracy(subject.seen.logits, subject.seen.targets)
            judged = metrics.verdict(
                subject.matrix, subject.seen.features, subject.seen.targets, accuracy=accuracy, removal=ablation
            )
            result |= judged.as_metrics()
    result["other_classes"] = result.pop("other_classes_without_its_filters")  # the name of timm-csg train
    return result


def measure_similarity(subject: Subject) -> dict[str, Any]:
    """How alike the filters of one class are, and those of different classes: by weights and by responses."""
    similarities = {"activation_similarity": metrics.activation_similarity(subject.seen.features)}
    with contextlib.suppress(ValueError):  # no layer with one output for each filter
        similarities["weight_similarity"] = metrics.weight_similarity(measuring.stage_weight(subject.model).weight)
    result: dict[str, Any] = {}
    for name, similarity in similarities.items():
        summary = metrics.summarize_similarity(similarity.cpu(), subject.owners)
        result |= {f"{name}_within": number(summary.within), f"{name}_across": number(summary.across)}
    return result


def number(value: float) -> float | None:
    """A value for JSON: None where there is none."""
    return float(value) if math.isfinite(value) else None


def _head_on_pooled(subject: Subject) -> tuple[nn.Module, Any]:
    """The head alone on the pooled features, where it needs no more than them; else the model on the images."""
    alone, expected = _HeadOnly(subject.model), subject.seen.logits[:64]
    features = alone.as_map(subject.seen.features)
    try:
        with torch.no_grad():
            found = alone.forward_head(features[:64]).cpu()
        enough = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    except (RuntimeError, ValueError, IndexError):  # a head for tokens refuses a map
        enough = False
    if enough:
        return alone, zip(features.split(256), subject.seen.targets.split(256), strict=True)
    return subject.model, subject.batches()


class _HeadOnly(nn.Module):
    """A timm model that starts where the features have been pooled; saves the backbone's pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.output_fmt = model, getattr(model, "output_fmt", "NCHW")

    def as_map(self, pooled: Tensor) -> Tensor:
        """Maps of one position."""
        return pooled[:, None, None] if is_channels_last(self) else pooled[:, :, None, None]

    def forward_features(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        """The model's own head."""
        device = next(self.model.parameters()).device
        logits: Tensor = self.model.forward_head(features.to(device))
        return logits
