"""The summary in plain words: what each number means, where it lies between worst and best, and what is good."""

from __future__ import annotations

from typing import NamedTuple

from timm_csg.plots.reporting.findings import Numbers


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
            "Correct answers",
            percent(numbers.accuracy),
            numbers.accuracy,
            "Share of the images that the network, as it would be used, assigns to the right class.",
            f"100%; always guessing the most frequent class gives {percent(chance)}.",
        ),
        "score": Measure(
            "Information per filter",
            percent(known),
            known,
            "How much of what is possible the response of a single filter reveals about the class it knows best, on "
            f"average ({numbers.mutual_information_score:.3f} of {bound:.3f} nats of mutual information).",
            "close to 100%: then one filter alone could tell whether an image belongs to its class.",
        ),
        "strongest": Measure(
            "Strongest images show the owner",
            percent(numbers.strongest_of_owner),
            numbers.strongest_of_owner,
            "Of the nine images that a filter responds to most, the share that shows the class that owns it.",
            "100%: the filter responds to its own class before any other.",
        ),
    }
    if numbers.gated_accuracy is not None:
        found["gated"] = Measure(
            "Correct answers from own filters only",
            percent(numbers.gated_accuracy),
            numbers.gated_accuracy,
            "The same, when each class may use only the filters that work for it.",
            "as high as the share of correct answers: then the explanations tell the whole story.",
        )
    if numbers.classes_per_filter is not None and numbers.gate_density is not None:
        found["density"] = Measure(
            "Classes per filter",
            f"{numbers.classes_per_filter:.2f}",
            min(1.0, numbers.gate_density),
            f"How many of the {numbers.classes} classes a filter works for, on average (gate density "
            f"{numbers.gate_density:.3f}).",
            "close to 1: every filter has one owner.",
        )
    if numbers.owner_agreement is not None and numbers.chance_agreement is not None:
        found["agreement"] = Measure(
            "Trained owner matches measured owner",
            percent(numbers.owner_agreement),
            numbers.owner_agreement,
            "Share of the filters that reveal most about the very class that owns them.",
            f"100%; owners assigned at random would give {percent(numbers.chance_agreement)}.",
        )
    if numbers.class_without_its_filters is not None and numbers.other_classes is not None:
        found["without"] = Measure(
            "A class without its own filters",
            percent(numbers.class_without_its_filters),
            numbers.class_without_its_filters,
            "Share of a class's images that are still recognised with its filters switched off, averaged over classes. "
            f"Meanwhile {percent(numbers.other_classes)} of the other classes' images are recognised.",
            "close to 0%, with the other classes unharmed: no other filters can stand in for those of the class.",
        )
    order = ("accuracy", "gated", "density", "agreement", "without", "score", "strongest")
    return {key: found[key] for key in order if key in found}
