"""What the report says of one class and of one filter: plain numbers that the templates print."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from timm_csg.plots.reporting.findings import Findings

_PARTNERS = 8
_CONFUSED = 6


@dataclass(frozen=True)
class ClassFacts:
    """One class.

    Attributes:
        label: Its index.
        images: Images of it.
        right: How many of them are recognised.
        filters: The filters it owns, those that reveal most about it first.
        without: Accuracy on it without these filters; None if that was not measured.
        others_without: Accuracy on the other classes meanwhile.
        taken_for: Classes that its images are taken for, with the number of images, most frequent first.
        taken_from: Classes whose images are taken for it.
    """

    label: int
    images: int
    right: int
    filters: list[int]
    without: float | None
    others_without: float | None
    taken_for: list[tuple[int, int]]
    taken_from: list[tuple[int, int]]


def class_facts(findings: Findings, label: int) -> ClassFacts:
    """What the report says of a class."""
    images, owned = int(findings.confusion[label].sum()), findings.filters_of(label)
    without = others_without = None
    if findings.ablation is not None and images:
        after = findings.ablation.after[label]
        without = float(after[label])
        others_without = float(after[[other for other in range(len(after)) if other != label]].nanmean())
    taken_for, taken_from = (
        [
            (int(other), int(row[other]))
            for other in row.argsort(descending=True, stable=True)[:_CONFUSED]
            if int(other) != label and int(row[other])
        ]
        for row in (findings.confusion[label], findings.confusion[:, label])
    )
    right = int(findings.confusion[label, label])
    return ClassFacts(label, images, right, owned, without, others_without, taken_for, taken_from)


def sharing(findings: Findings, label: int) -> list[tuple[int, list[int]]]:
    """The classes that a class shares most filters with, and these filters."""
    both = (findings.serves & findings.serves[label]).sum(dim=1)
    both[label] = 0
    order = both.argsort(descending=True, stable=True)[:_PARTNERS].tolist()
    return [(other, findings.serving_both(label, other)) for other in order if int(both[other])]


@dataclass(frozen=True)
class FilterFacts:
    """One filter.

    Attributes:
        index: Its number.
        silent: Whether it gives the same response to every image.
        owner: Its class; None where a mechanism gave it none.
        gate: Its largest entry in the class-filter matrix, that for its class; None without a matrix.
        also: The other classes that it serves.
        measured: The class it reveals most about.
        by_silence: Whether it responds less to that class than, on average, to the others.
        mutual: How much it reveals about that class, nats.
        known: The same as a share of what is possible.
        hits: How many of its strongest images are of its owner.
        strongest: How many images that is of.
        loudest: Its largest mean response to a class.
        classes: All classes, those that it has most to do with first.
    """

    index: int
    silent: bool
    owner: int | None
    gate: float | None
    also: list[int]
    measured: int
    by_silence: bool
    mutual: float
    known: float
    hits: int
    strongest: int
    loudest: float
    classes: list[int]


def filter_facts(findings: Findings, index: int) -> FilterFacts:
    """What the report says of a filter."""
    owner, column = int(findings.owners[index]), findings.mutual[:, index]
    responses, measured, mutual = findings.responses[:, index], int(column.argmax()), float(column.max())
    others = torch.ones_like(responses, dtype=torch.bool)
    others[measured] = False
    order = column.argsort(descending=True, stable=True)
    order = order[findings.strength[order, index].argsort(descending=True, stable=True)]
    return FilterFacts(
        index=index,
        silent=bool(findings.silent[index]),
        owner=owner if owner >= 0 else None,
        gate=None if findings.gate is None else float(findings.gate[:, index].max()),
        also=[label for label in findings.serves[:, index].nonzero().flatten().tolist() if label != owner],
        measured=measured,
        by_silence=bool(responses[measured] < responses[others].nanmean()),
        mutual=mutual,
        known=mutual / findings.numbers["mutual_information_bound"],
        hits=int((findings.targets[findings.strongest[index]] == owner).sum()),
        strongest=findings.strongest.shape[1],
        loudest=float(responses.nan_to_num().max().clamp_min(1e-12)),
        classes=order.tolist(),
    )
