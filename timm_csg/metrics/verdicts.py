"""Whether the owners that a class-filter matrix names can be trusted, in one sentence, and what to try if not.

All thresholds stand here. Owners are trusted if every one of these holds on pictures that training has not seen:

* the model names classes clearly better than "always the most frequent class" does;
* most filters in use have exactly one owner; how sparse the matrix is decides nothing;
* nearly every owned filter responds most to its owner, by the signed correlation, which also tells two classes apart;
* the filters' correlation with their owners is clearly above what the *best* class reaches with shuffled labels;
* a class without its filters is no longer recognised, and the others are as before;
* no accuracy is lost against standard training, where that is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.metrics._checks import check_features, check_rows, class_counts
from timm_csg.metrics.ablation import Ablation
from timm_csg.metrics.class_specificity import class_sums, indicator_norm, standardised_chunks

OWNED = 0.5  # a filter serves a class with more than this strength
LEAST_OWNED = 0.5  # share of the filters in use that have exactly one owner
LEAST_AGREEMENT = 0.9  # share of the owned filters that respond most to their owner
LEAST_CORRELATION = 0.1  # of filters with their owners, mean; a weaker one can be real and still tell nobody anything
CLEARLY_ABOVE = 5.0  # deviations above the mean of the shuffled labels
SHUFFLES = 20
MOST_LEFT = 0.10  # accuracy of a class without its filters; half of guessing where that is more
MOST_LOST = 0.02  # accuracy, of the other classes and against standard training; one picture where that is more
ABOVE_GUESSING = 2.0  # standard errors above the share of the most frequent class

_ROUNDING = 1e-9
_ASSIGN = "Train for more steps or at a higher learning rate, with assigned filters (mechanism 'assigned')."
_SPARSER = "A gate becomes sparse slowly: train for many more epochs, or take assigned filters (mechanism 'assigned')."
_MASK = "Let the classifier use only a class's own filters: train with assigned filters and a masked classifier."


@dataclass(frozen=True)
class Verdict:
    """What ``verdict`` found.

    Attributes:
        trusted: Whether the owners can be trusted.
        sentence: That, with the numbers or the first reason against it, as one sentence.
        reasons: Everything that speaks against the owners, the most fundamental first; empty if trusted.
        advice: What to try next; empty if trusted.
        owned: Share of the filters in use that have exactly one owner.
        agreement: Share of the owned filters that respond most to their owner; 0 without any.
        shuffled_agreement: The same with shuffled labels, mean.
        correlation: Correlation of the owned filters with their owners, mean; 0 without any.
        shuffled_correlation: Correlation with the best class when labels are shuffled, mean.
        shuffled_deviation: Standard deviation of that over the shuffles.
    """

    trusted: bool
    sentence: str
    reasons: tuple[str, ...]
    advice: str
    owned: float
    agreement: float
    shuffled_agreement: float
    correlation: float
    shuffled_correlation: float
    shuffled_deviation: float

    def as_metrics(self) -> dict[str, bool | str]:
        """The entries of ``metrics.json`` and of the model card."""
        return {"owners_trusted": self.trusted, "verdict": self.sentence, "verdict_advice": self.advice}


class _Objection(NamedTuple):
    reason: str
    advice: str


class _Owners(NamedTuple):
    """How far the responses bear out the owners, and what shuffled labels give."""

    owned: float
    agreement: float
    shuffled_agreement: float
    correlation: float
    shuffled_correlation: float
    shuffled_deviation: float


def verdict(
    class_filter_matrix: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    accuracy: float,
    removal: Ablation | None,
    standard_accuracy: float | None = None,
    masked: bool = False,
    random_state: int = 0,
) -> Verdict:
    """Judge whether the owners of a model's filters can be trusted, from measurements on held-out pictures.

    Ours; the module's docstring lists the conditions, its constants the thresholds. A filter is owned if it serves
    exactly one class with more than half strength. Its owner agrees if it is the class with which the filter's response
    has the largest correlation (``class_correlation``), and that is positive; a filter that never responds disagrees.
    With few classes even random owners agree often, and filters that all respond alike agree or disagree together.
    So the mean correlation with the owner is compared with that of the best class for each filter after the labels
    were shuffled. That baseline is reached by owners chosen from these very pictures, too. Filters of classes without
    pictures are not judged.

    Few pictures lead to "no" where filters tell little: with 36 of three classes a mean correlation of 0.3 to 0.6 is
    needed, the more the filters resemble each other. On the training pictures it would judge what was learnt by heart.

    Args:
        class_filter_matrix: Gate or assignment [classes, filters], entries in [0, 1]; not the mutual information.
        features: Pooled responses [samples, filters] of held-out pictures.
        targets: Their class indices [samples].
        accuracy: Share of these pictures that the standard path gets right.
        removal: What ``measuring.ablate`` found for these owners; None: not measured, and then the answer is no.
        standard_accuracy: Accuracy of standard training with the same budget; None if not known.
        masked: Whether the classifier can use a class's own filters only; the sentence then says so.
        random_state: Seed of the shuffles.

    Returns:
        The verdict.

    Raises:
        TypeError, ValueError: If matrix, features and targets are not as stated or do not fit each other.

    Example:
        >>> targets = torch.arange(40) % 2
        >>> features = torch.nn.functional.one_hot(targets).float()
        >>> removal = Ablation(before=torch.ones(2), after=1 - torch.eye(2))
        >>> verdict(torch.eye(2), features, targets, accuracy=1.0, removal=removal).trusted
        True
        >>> verdict(torch.ones(2, 2), features, targets, accuracy=1.0, removal=removal).sentence
        'The owners of the filters cannot be trusted: no filter serves one class alone.'
    """
    counts = _check(class_filter_matrix, features, targets)
    serves = class_filter_matrix.detach().to(features.device) > OWNED
    found = _owners(serves, features, targets, counts, random_state)
    objections = [
        *_against_guessing(accuracy, counts),
        *_against_the_matrix(serves),
        *_against_the_owners(found),
        *_against_the_removal(removal, counts),
        *_against_the_training(accuracy, standard_accuracy, len(targets)),
    ]
    return Verdict(
        trusted=not objections,
        sentence=_sentence(objections, found, removal, masked),
        reasons=tuple(objection.reason for objection in objections),
        advice=objections[0].advice if objections else "",
        **found._asdict(),
    )


def _check(matrix: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """Number of pictures of each class [classes]; raises if something does not fit."""
    check_features(features)
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[1] != features.shape[1]:
        found = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"class_filter_matrix must be [classes, {features.shape[1]} filters], as the features have, but is "
            f"{found}; pass model.mechanism.class_filter_matrix() and the features of the same model."
        )
    entries = matrix.detach().float()
    if not bool(((entries >= 0) & (entries <= 1 + 1e-3)).all()):
        raise ValueError(
            f"class_filter_matrix must have entries in [0, 1], but they range from {float(entries.min()):.3g} to "
            f"{float(entries.max()):.3g}; pass a gate or an assignment, not scores."
        )
    check_rows(features, targets)
    return class_counts(targets, len(matrix))


def _owners(serves: Tensor, features: Tensor, targets: Tensor, counts: Tensor, seed: int) -> _Owners:
    """How far the responses bear out the owners, with the true labels and with shuffled ones."""
    exclusive = serves.sum(dim=0) == 1
    owned = float(exclusive.sum()) / max(1, int(serves.any(dim=0).sum()))
    seen = (counts > 0).to(serves.device)
    judged = (exclusive & serves[seen].any(dim=0)).nonzero().flatten()
    if len(judged) == 0:
        return _Owners(owned, 0.0, 0.0, 0.0, 0.0, 0.0)
    owner = serves[:, judged].int().argmax(dim=0)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(targets), generator=generator, device="cpu") for _ in range(SHUFFLES)]
    labels = [targets, *(targets[order] for order in orders)]
    scale = indicator_norm(counts.to(features.device))
    agreed, own_sum, best_sum = torch.zeros(3, len(labels), dtype=torch.float64, device="cpu")
    start = 0
    for chunk in standardised_chunks(features[:, judged], len(counts)):
        owners_here = owner[start : start + chunk.shape[1]]
        start += chunk.shape[1]
        for index, shuffled in enumerate(labels):
            correlation = class_sums(chunk, shuffled, len(counts)) * scale
            own, best = correlation.gather(0, owners_here[None])[0], correlation.amax(dim=0)
            agreed[index] += ((own == best) & (own > 0)).sum().cpu()
            own_sum[index] += own.sum().cpu()
            best_sum[index] += best.sum().cpu()
    agreed, own_sum, best_sum = agreed / len(judged), own_sum / len(judged), best_sum / len(judged)
    return _Owners(
        owned,
        float(agreed[0]),
        float(agreed[1:].mean()),
        float(own_sum[0]),
        float(best_sum[1:].mean()),
        float(best_sum[1:].std()),
    )


def _against_guessing(accuracy: float, counts: Tensor) -> Iterator[_Objection]:
    samples, share = int(counts.sum()), float(counts.max() / counts.sum())
    if share == 1:
        yield _Objection("the pictures that were measured show one class only", "Measure pictures of all classes.")
    elif not accuracy > share + ABOVE_GUESSING * math.sqrt(share * (1 - share) / samples):
        yield _Objection(
            "the model is hardly better than naming the most frequent class every time "
            f"(accuracy {accuracy:.3f} against {share:.3f})",
            "Check the labels and the preprocessing, and train until standard training is accurate.",
        )


def _against_the_matrix(serves: Tensor) -> Iterator[_Objection]:
    classes, filters = serves.shape
    in_use, exclusive = int(serves.any(dim=0).sum()), int((serves.sum(dim=0) == 1).sum())
    if exclusive and exclusive >= LEAST_OWNED * in_use:
        return
    some = (
        f"only {exclusive} of {in_use} filters serve{'s' if exclusive == 1 else ''}"
        if exclusive
        else "no filter serves"
    )
    wider = f"There are fewer filters ({filters}) than classes ({classes}): use a wider model or fewer classes."
    yield _Objection(f"{some} one class alone", wider if filters < classes else _SPARSER)


def _against_the_owners(found: _Owners) -> Iterator[_Objection]:
    if found.owned == 0:
        return
    if found.agreement < LEAST_AGREEMENT:
        yield _Objection(
            f"only {found.agreement:.0%} of the owned filters respond most to their owner (at least "
            f"{LEAST_AGREEMENT:.0%} are needed; shuffled labels give {found.shuffled_agreement:.0%})",
            _ASSIGN,
        )
    least = found.shuffled_correlation + CLEARLY_ABOVE * found.shuffled_deviation
    if not found.correlation > max(least, LEAST_CORRELATION):
        yield _Objection(
            f"filters hardly tell their owner from the other classes (mean correlation {found.correlation:.2f}, "
            f"above {max(least, LEAST_CORRELATION):.2f} is needed; the best class has "
            f"{found.shuffled_correlation:.2f} with shuffled labels)",
            "Check the labels, measure more held-out pictures, and train for more steps.",
        )


def _against_the_removal(removal: Ablation | None, counts: Tensor) -> Iterator[_Objection]:
    if removal is None:
        yield _Objection(
            "the accuracy of a class without its filters was not measured",
            "Measure it with timm_csg.measuring.ablate.",
        )
        return
    before, classes = float(removal.before.nanmean()), int((counts > 0).sum())
    most_left = min(max(MOST_LEFT, 0.5 / max(classes, 1)), before / 2)
    if not removal.own <= most_left:
        yield _Objection(
            f"a class is still recognised without its filters (accuracy {removal.own:.3f}, at most {most_left:.3f} is "
            "allowed)",
            _MASK,
        )
    if not removal.others >= before - max(MOST_LOST, 1 / int(counts.sum())) - _ROUNDING:
        yield _Objection(
            f"removing one class's filters harms the others (accuracy {removal.others:.3f} instead of {before:.3f})",
            _MASK,
        )


def _against_the_training(accuracy: float, standard_accuracy: float | None, samples: int) -> Iterator[_Objection]:
    if standard_accuracy is None or accuracy >= standard_accuracy - max(MOST_LOST, 1 / samples) - _ROUNDING:
        return
    yield _Objection(
        f"the accuracy is {accuracy:.3f}, and standard training has {standard_accuracy:.3f}",
        "Train for more epochs, or try other learning rates; with few pictures, train the last stage only.",
    )


def _sentence(objections: list[_Objection], found: _Owners, removal: Ablation | None, masked: bool) -> str:
    if objections:
        return f"The owners of the filters cannot be trusted: {objections[0].reason}."
    why = ", since the classifier is masked to use no others" if masked else ""
    left = "" if removal is None else f", and without its filters a class has an accuracy of {removal.own:.3f}{why}"
    return (
        f"The owners of the filters can be trusted: {found.agreement:.0%} of the owned filters respond most to their "
        f"owner ({found.shuffled_agreement:.0%} with shuffled labels){left}."
    )
