"""The groups of metrics of ``timm-csg evaluate``: what they measure, what they need, what the table shows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from timm_csg.cli import measures, measures_optional
from timm_csg.cli.measures import Subject
from timm_csg.cli.spelling import did_you_mean


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        key: Of the results.
        label: What people call it.
        places: Digits after the point.
        best: ``max`` or ``min`` where one of them is better; None: nothing is marked.
    """

    key: str
    label: str
    places: int = 3
    best: Callable[[Sequence[float]], float] | None = None


class Group(NamedTuple):
    """Metrics that are measured together.

    Attributes:
        measure: Returns values by key; those left out do not apply to this model.
        rows: Lines of the table.
        others: Keys of the results that have no line of their own.
        needs: The option that turns the group on; None: it is on by default.
        note: Below the table.
    """

    measure: Callable[[Subject], dict[str, Any]]
    rows: tuple[Row, ...]
    others: tuple[str, ...] = ()
    needs: str | None = None
    note: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the results."""
        return (*(row.key for row in self.rows), *self.others)


GROUPS: dict[str, Group] = {
    "accuracy": Group(
        measures.measure_accuracy,
        (Row("accuracy", "accuracy", 4, max), Row("gated_accuracy", "gated accuracy", 4)),
        ("gated_accuracy_uses_labels",),
    ),
    "information": Group(
        measures.measure_information,
        (Row("mutual_information_score", "MIS (nats)", 4, max),),
        ("mutual_information_score_interval", "mutual_information_bound"),
        note="MIS: what a filter tells about its best class, mean over filters; at most {bound:.3f} here. "
        "Interval: 95 %, over images.",
    ),
    "gate": Group(
        measures.measure_gate,
        (
            Row("gate_density", "gate density", 3, min),
            Row("gate_binarity", "gate binarity", 3),
            Row("classes_per_filter", "classes per filter", 2, min),
            Row("owner_agreement", "owner agrees", 3, max),
            Row("purity", "purity of the 20 strongest", 3, max),
            Row("class_selectivity", "class selectivity", 3, max),
        ),
        ("filter_owners_by", "filters_per_class"),
        note="density: mean gate, at least 1 / classes = {least:.3f}. owner agrees: share of filters whose gate class "
        "is the one they tell most about. purity: share of one class among a filter's 20 strongest images.",
    ),
    "ablation": Group(
        measures.measure_ablation,
        (
            Row("class_without_its_filters", "class without its filters", 3, min),
            Row("other_classes", "  others meanwhile", 3, max),
            Row("class_with_only_its_filters", "class with only its filters", 3, max),
            Row("other_classes_with_only_its_filters", "  others meanwhile", 3, min),
        ),
        ("owners_trusted", "verdict", "verdict_advice"),
        note="a class's filters: those it owns by its gate, or that tell most about it where there is none. "
        "Removal hides a class: other filters can still know it.",
    ),
    "similarity": Group(
        measures.measure_similarity,
        (
            Row("weight_similarity_within", "weights alike, same class"),
            Row("weight_similarity_across", "  different classes"),
            Row("activation_similarity_within", "responses alike, same class"),
            Row("activation_similarity_across", "  different classes"),
        ),
        note="alike: mean absolute cosine of two filters' weights; mean absolute correlation of their responses.",
    ),
    "parts": Group(
        measures_optional.measure_parts,
        (
            Row("location_instability", "location instability", 4, min),
            Row("location_instability_own_class", "  on the filter's own class", 4, min),
            Row("part_interpretability", "part interpretability", 3, max),
            Row("part_interpretability_own_class", "  on the filter's own class", 3, max),
        ),
        ("silent_filters", "landmarks", "part_field_diameter"),
        "landmarks",
        "instability: deviation of the distance between a filter's peak and a landmark, in image diagonals. "
        "interpretability: share of images in which a filter fits a part.",
    ),
    "localisation": Group(
        measures_optional.measure_localisation,
        (
            Row("gradmap_iou", "GradMap IoU", 3, max),
            Row("gradmap_ap20", "  AP20", 3, max),
            Row("activmap_iou", "ActivMap IoU", 3, max),
            Row("activmap_ap30", "  AP30", 3, max),
            Row("cam_iou", "CAM IoU", 3, max),
            Row("cam_ap30", "  AP30", 3, max),
            Row("whole_image_iou", "whole image IoU", 3),
        ),
        ("gradmap_ap30", "activmap_ap20", "cam_ap20"),
        "boxes",
        "IoU: overlap with the object's box; whole image: that of the answer 'everywhere'. AP20, AP30: share of images "
        "(ActivMap: of each filter's images) with at least 0.2, 0.3.",
    ),
    "adversarial": Group(
        measures_optional.measure_adversarial,
        (),
        ("adversarial", "adversarial_images"),
        "attacks",
        "attack strengths in grey levels of 255. missed by: error rate of a detector on images that an attack turned "
        "from right to wrong, and on the same images before it (guessing: 0.5).",
    ),
}


def choose_groups(names: Sequence[str] | None, options: Mapping[str, Any]) -> dict[str, Group]:
    """The groups to measure: those named, or all that need no option; and those whose option is given.

    Args:
        names: Of groups; None: the default.
        options: Value of each option that a group can need; empty or None where it is not given.

    Raises:
        ValueError: If a name is unknown, or the option that a group needs is missing.

    Example:
        >>> list(choose_groups(["gate"], {"boxes": "boxes.csv"}))
        ['gate', 'localisation']
    """
    if names is not None and not names:
        raise ValueError(f"--metrics names no group of metrics; there are {', '.join(GROUPS)}.")
    for name in names or ():
        if name not in GROUPS:
            listed = f"; there are {', '.join(GROUPS)}."
            raise ValueError(f"there is no group of metrics {name!r}{did_you_mean(name, GROUPS) or listed}")
        needs = GROUPS[name].needs
        if needs is not None and not options.get(needs):
            raise ValueError(f"the metrics {name!r} need --{needs}.")
    return {
        name: group
        for name, group in GROUPS.items()
        if (options.get(group.needs) if group.needs else names is None) or name in (names or ())
    }
