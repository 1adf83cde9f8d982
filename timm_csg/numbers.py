"""Every number that is measured, once: its name in each place where it is read, what is best, and what it means.

Its readers are the tables of ``timm-csg train`` and ``timm-csg evaluate``, the report, the model card and ``timm-csg
inspect``. How a number is computed from a model and images stands in ``timm_csg.measuring.measures``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Gauge(NamedTuple):
    """A number as the report shows it: as a share, in plain words, on a bar from the worst to the best.

    Texts may hold other numbers in the way of ``str.format``; ``Findings.numbers`` has all of them.

    Attributes:
        name: A few words.
        meaning: One sentence.
        good: What a good value is.
        whole: Key of the number that the whole bar stands for; empty: 1.
        shown: The value in words; empty: the share in percent.
    """

    name: str
    meaning: str
    good: str
    whole: str = ""
    shown: str = ""


class Number(NamedTuple):
    """What people are told of a number.

    Attributes:
        key: In ``metrics.json``.
        group: Of numbers that are measured together, see ``GROUPS``.
        label: In the table of ``timm-csg evaluate``, indented below the line that it belongs to; empty: no line.
        places: Digits after the point.
        best: Which value is better; None: neither.
        head: Of its column in the table of ``timm-csg train``; empty: no column.
        title: On the model card, with the unit.
        note: What it means, for the lines below a table.
        gauge: In the report; None: not there.
        is_summary: Whether ``timm-csg train`` measures it though it has neither a column nor a line on the card.
    """

    key: str
    group: str
    label: str = ""
    places: int = 3
    best: Literal["high", "low"] | None = None
    head: str = ""
    title: str = ""
    note: str = ""
    gauge: Gauge | None = None
    is_summary: bool = False


class Group(NamedTuple):
    """Numbers that are measured together.

    Attributes:
        needs: The option that turns the group on; empty: it is on by default.
        note: For the lines below a table.
    """

    needs: str = ""
    note: str = ""


GROUPS = {
    "accuracy": Group(),
    "information": Group(),
    "gate": Group(),
    "ablation": Group(
        note="A class's filters: those it owns by its gate or, without one, those that reveal most about it. Removal "
        "hides a class: other filters can still know it."
    ),
    "similarity": Group(
        note="alike: mean absolute cosine of two filters' weights; mean absolute correlation of their responses."
    ),
    "filters": Group("filters", "contrastiveness: how clearly a filter is on or off; noise behind a ReLU is, too."),
    "explanations": Group("explanations"),
    "parts": Group("landmarks"),
    "localisation": Group(
        "boxes",
        "IoU: overlap with the object's box; whole image: that of the answer 'everywhere'. AP20, AP30: share of images "
        "(ActivMap: of each filter's images) with at least 0.2, 0.3.",
    ),
    "adversarial": Group(
        "attacks",
        "attack strengths in grey levels of 255. missed by: error rate of a detector on images that an attack turned "
        "from right to wrong, and on the same images before it (guessing: 0.5).",
    ),
}

# fmt: off
NUMBERS = (
    Number(
        "accuracy", "accuracy", "accuracy", 4, "high", "accu-\nracy", "accuracy, standard path",
        gauge=Gauge(
            "Correct answers", "Share of the images that the network, as it would be used, assigns to the right class.",
            "100%; always guessing the most frequent class gives {most_frequent:.1%}.",
        ),
    ),
    Number(
        "gated_accuracy", "accuracy", "gated accuracy", 4, head="gated", title="accuracy, gated path",
        note="gated accuracy: that of the gated path, where each class may use its own filters only.",
        gauge=Gauge(
            "Correct answers from own filters only",
            "The same, when each class may use only the filters that work for it.",
            "as high as the share of correct answers: then the explanations tell the whole story.",
        ),
    ),
    Number("gated_accuracy_uses_labels", "accuracy", is_summary=True),
    Number("accuracy_interval", "accuracy", is_summary=True, note="Interval of the accuracy: 95 %, over images."),
    Number("sensitivity", "accuracy", is_summary=True),
    Number("specificity", "accuracy", is_summary=True),
    Number(
        "mutual_information_score", "information", "MIS (nats)", 4, "high", "MIS",
        "mutual-information score (MIS), nats",
        "MIS: how much a filter reveals about its best class (mutual information, mean over filters, in nats); at most "
        "{mutual_information_bound:.3f} here.",
        Gauge(
            "Information per filter",
            "How much of what is possible the response of a single filter reveals about the class it knows best, on "
            "average ({mutual_information_score:.3f} of {mutual_information_bound:.3f} nats of mutual "
            "information{information_floor}).",
            "close to 100%: then one filter alone could tell whether an image belongs to its class.",
            whole="mutual_information_bound",
        ),
    ),
    Number("mutual_information_score_interval", "information", note="Interval: 95 %, over images."),
    Number("mutual_information_score_floor", "information", "  with shuffled labels", 4, title="MIS, labels shuffled"),
    Number("mutual_information_bound", "information", title="largest MIS possible, nats"),
    Number(
        "gate_density", "gate", "gate density", 3, "low", "den-\nsity",
        "gate density (1 / classes: each filter serves one class)",
        "density: mean gate, at least 1 / classes = {least_density:.3f}.",
        Gauge(
            "Classes per filter",
            "How many of the {classes} classes a filter works for, on average (gate density {gate_density:.3f}).",
            "close to 1: every filter has one owner.", shown="{mean_classes:.2f}",
        ),
    ),
    Number("gate_binarity", "gate", "gate binarity"),
    Number("classes_per_filter", "gate", "classes per filter", 2, "low"),
    Number(
        "owner_agreement", "gate", "owner by MI", 3, "high", "owner\nby MI",
        "filters that reveal most about the class that owns them, by mutual information",
        "owner by MI: share of filters that reveal most about the class that owns them, by mutual information, which "
        "counts silence too; the verdict counts those that respond most to it.",
        Gauge(
            "Filters that reveal most about their owner",
            "Share of the filters from which the class that owns them can be told better than any other (mutual "
            "information; telling it by silence counts). The verdict asks for more: to respond most to the owner.",
            "100%; owners assigned at random would give {chance_agreement:.1%}.",
        ),
    ),
    Number("chance_agreement", "gate"),
    Number(
        "purity", "gate", "purity of the 20 strongest", 3, "high",
        title="share of one class among a filter's 20 strongest images",
        note="purity: share of one class among a filter's 20 strongest images.",
        gauge=Gauge(
            "Strongest images of one class",
            "Of a filter's 20 strongest images, the share of one class; with shuffled labels {purity_floor:.1%}.",
            "{purity_best:.0%}, the most that these images allow, and far from the value of shuffled labels.",
        ),
    ),
    Number("purity_floor", "gate", "  with shuffled labels", title="the same with shuffled labels"),
    Number(
        "strongest_show_owner", "gate",
        gauge=Gauge(
            "Strongest images show the owner",
            "Of the nine images that a filter responds to most, the share that shows the class that owns it.",
            "100%: the filter responds to its own class before any other.",
        ),
    ),
    Number("class_selectivity", "gate", "class selectivity", best="high"),
    Number("class_selectivity_floor", "gate", "  with shuffled labels"),
    Number("class_independence", "gate", "class independence", best="low"),
    Number("class_independence_floor", "gate", "  with shuffled labels"),
    Number("filter_owners_by", "gate", is_summary=True),
    Number("filters_per_class", "gate", is_summary=True),
    Number(
        "class_without_its_filters", "ablation", "class without its filters", 3, "low", "class\nw/o",
        "accuracy of a class without its own filters",
        "w/o: accuracy of a class without its own filters; others: of the other classes meanwhile.",
        Gauge(
            "A class without its own filters",
            "Share of a class's images that are still recognised with its filters switched off, averaged over "
            "classes. Meanwhile {other_classes:.1%} of the other classes' images are recognised.",
            "close to 0%, with the other classes unharmed: no other filters can stand in for those of the class.",
        ),
    ),
    Number(
        "other_classes", "ablation", "  others meanwhile", 3, "high", "others",
        "accuracy of the other classes meanwhile",
    ),
    Number("class_with_only_its_filters", "ablation", "class with only its filters", best="high"),
    Number("other_classes_with_only_its_filters", "ablation", "  others meanwhile", best="low"),
    Number("owners_trusted", "ablation", is_summary=True),
    Number("verdict", "ablation", is_summary=True),
    Number("verdict_advice", "ablation", is_summary=True),
    Number("weight_similarity_within", "similarity", "weights alike, same class"),
    Number("weight_similarity_across", "similarity", "  different classes"),
    Number("activation_similarity_within", "similarity", "responses alike, same class"),
    Number("activation_similarity_across", "similarity", "  different classes"),
    Number("contrastiveness", "filters", "contrastiveness"),
    Number(
        "relearnt_class", "filters", "class relearnt without its filters",
        note="relearnt: accuracy of a class in a new linear classifier, fitted without the class's filters on half of "
        "the images and tried on the others. Near that with all filters: removal only hides the class.",
    ),
    Number("relearnt_class_before", "filters", "  with all filters"),
    Number("sid5", "filters", "SID@5", best="high"),
    Number("sid5_floor", "filters", "  with shuffled labels"),
    Number("mono_score", "filters", "MonoScore", best="high"),
    Number("mono_score_floor", "filters", "  with shuffled images"),
    Number("explanations", "explanations"),
    Number(
        "location_instability", "parts", "location instability", 4, "low",
        note="instability: deviation of the distance between a filter's peak and a landmark, in image diagonals.",
    ),
    Number("location_instability_own_class", "parts", "  on the filter's own class", 4, "low"),
    Number(
        "part_interpretability", "parts", "part interpretability", best="high",
        note="interpretability: share of images in which a filter fits a part.",
    ),
    Number("part_interpretability_own_class", "parts", "  on the filter's own class", best="high"),
    Number("part_consistency", "parts", "part consistency", best="high"),
    Number("part_consistency_floor", "parts", "  landmarks of other images"),
    Number("part_stability", "parts", "part stability", best="high"),
    Number("part_stability_floor", "parts", "  places in other images"),
    Number("silent_filters", "parts"),
    Number("landmarks", "parts"),
    Number("part_field_diameter", "parts"),
    Number("gradmap_iou", "localisation", "GradMap IoU", best="high"),
    Number("gradmap_ap20", "localisation", "  AP20", best="high"),
    Number("gradmap_ap30", "localisation"),
    Number("activmap_iou", "localisation", "ActivMap IoU", best="high"),
    Number("activmap_ap20", "localisation"),
    Number("activmap_ap30", "localisation", "  AP30", best="high"),
    Number("cam_iou", "localisation", "CAM IoU", best="high"),
    Number("cam_ap20", "localisation"),
    Number("cam_ap30", "localisation", "  AP30", best="high"),
    Number("whole_image_iou", "localisation", "whole image IoU"),
    Number("adversarial", "adversarial"),
    Number("adversarial_images", "adversarial"),
)
# fmt: on
SUMMARY = tuple(number.key for number in NUMBERS if number.head or number.title or number.is_summary)
LABELS_GIVEN = "the label gate is given the true label: this says nothing about new images."


def notes(shown: set[str], facts: Mapping[str, Any]) -> list[str]:
    """The lines below a table, one for each group of numbers.

    Args:
        shown: Keys of the numbers in the table.
        facts: Numbers that notes mention.

    Returns:
        The lines.

    Example:
        >>> notes({"purity"}, {})
        ["purity: share of one class among a filter's 20 strongest images."]
    """
    lines = []
    for name, group in GROUPS.items():
        here = [number for number in NUMBERS if number.group == name and number.key in shown]
        said = [number.note.format_map(facts) for number in here if number.note]
        lines.append(" ".join([*said, *([group.note] if here and group.note else [])]))
    return [line for line in lines if line]
