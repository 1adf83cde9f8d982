"""The summary in plain words: what each number means, where it lies between worst and best, and what to make of it."""

from __future__ import annotations

from typing import NamedTuple

from timm_csg.plots.report.findings import Numbers

FEW_CLASSES = 2.0  # a filter that works for more has no owner worth the name


class Measure(NamedTuple):
    """One number of the summary.

    Attributes:
        name: A few words.
        value: As shown.
        place: Where it lies on the gauge, 0 to 1.
        meaning: One sentence.
        good: What a good value is.
    """

    name: str
    value: str
    place: float
    meaning: str
    good: str


def percent(share: float) -> str:
    """A share in words.

    Example:
        >>> percent(0.98765)
        '98.8%'
    """
    return f"{100 * share:.1f}%"


def on_scale(share: float, end: float = 100) -> str:
    """A share as a place on a drawn scale; outside of 0 to 1 it lies at an end.

    Example:
        >>> on_scale(0.5), on_scale(7, end=98.8)
        ('50.0', '98.8')
    """
    return f"{end * max(0.0, min(1.0, share)):.1f}"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun.

    Example:
        >>> count(1, "filter"), count(2, "class", "classes")
        ('1 filter', '2 classes')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def measures(numbers: Numbers, chance: float) -> dict[str, Measure]:
    """The numbers that apply to a model, by a key that two models share.

    Args:
        numbers: Of one model.
        chance: Share of the most frequent class, which guessing would get right.
    """
    bound = numbers.mutual_information_bound
    known = numbers.mutual_information_score / bound if bound > 0 else 0.0
    found = {
        "accuracy": Measure(
            "Right answers",
            percent(numbers.accuracy),
            numbers.accuracy,
            "Share of the images that are given their right class, by the network as it is used.",
            f"100%; always guessing the most frequent class gives {percent(chance)}.",
        ),
        "score": Measure(
            "What one filter knows",
            f"{numbers.mutual_information_score:.3f} nats",
            known,
            f"Mutual-information score: how much the response of a single filter tells about the class it knows best, "
            f"mean over filters. Here {percent(known)} of what "
            "is possible.",
            f"close to {bound:.3f} nats: then one filter alone would decide whether an image belongs to its class.",
        ),
        "strongest": Measure(
            "Strongest images are of the owner",
            percent(numbers.strongest_of_owner),
            numbers.strongest_of_owner,
            "Of the nine images that drive a filter most, the share that shows the class which owns it.",
            "100%: the filter responds to its class before all others.",
        ),
    }
    if numbers.gated_accuracy is not None:
        found["gated"] = Measure(
            "Right answers from owned filters only",
            percent(numbers.gated_accuracy),
            numbers.gated_accuracy,
            "The same, when the score of every class may use nothing but the filters that work for it.",
            "as high as above: then the explanations tell the whole story.",
        )
    if numbers.gate_density is not None:
        served = numbers.gate_density * numbers.classes
        found["density"] = Measure(
            "Classes that a filter works for",
            f"{served:.2f}",
            min(1.0, numbers.gate_density),
            f"Sum of a filter's gates over all {numbers.classes} classes, mean over filters (gate density "
            f"{numbers.gate_density:.3f}).",
            "close to 1: every filter has one owner.",
        )
    if numbers.owner_agreement is not None:
        found["agreement"] = Measure(
            "Trained owner is the measured one",
            percent(numbers.owner_agreement),
            numbers.owner_agreement,
            "Share of the filters that tell most about the very class that owns them.",
            f"100%; owners drawn by lot would give {percent(1 / numbers.classes)}.",
        )
    if numbers.class_without_its_filters is not None and numbers.other_classes is not None:
        found["without"] = Measure(
            "A class without its own filters",
            percent(numbers.class_without_its_filters),
            numbers.class_without_its_filters,
            "Right answers on a class after its filters are switched off, mean over classes. Meanwhile the other "
            f"classes get {percent(numbers.other_classes)} right.",
            "close to 0%, with the other classes unharmed: nobody else knows the class.",
        )
    order = ("accuracy", "gated", "density", "agreement", "without", "score", "strongest")
    return {key: found[key] for key in order if key in found}
