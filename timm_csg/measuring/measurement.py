"""``measure``: every number of a model, or some of them, from one pass over the images and what it needs beside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_csg.checks import nearest, whole
from timm_csg.measuring.attacked import ATTACKS
from timm_csg.measuring.collecting import collect
from timm_csg.measuring.marked import check_files
from timm_csg.measuring.measures import CLASS_COLUMNS, FILTER_COLUMNS, MEASURES, Measure
from timm_csg.measuring.subject import Subject
from timm_csg.numbers import GROUPS, NUMBERS


@dataclass(frozen=True, eq=False, repr=False)
class Measurement:
    """What ``measure`` returns.

    Attributes:
        numbers: By key, fit for JSON; None where one does not apply. What they mean: ``timm_csg.numbers``.
        classes: Columns by class, such as ``"accuracy"`` [classes].
        filters: Columns by filter, such as ``"owner"``, the index of its class or -1 [filters].
        subject: The model with what was seen of it.
    """

    numbers: dict[str, Any]
    classes: dict[str, Tensor]
    filters: dict[str, Tensor]
    subject: Subject

    def __repr__(self) -> str:
        known = {number.key: number for number in NUMBERS if number.label}
        shown = [
            f"{key}={self.numbers[key]:.{known[key].places}f}"
            for key in self.numbers
            if key in known and isinstance(self.numbers[key], float)
        ]
        return f"Measurement({', '.join(shown)})"


def measure(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    groups: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    amp_dtype: torch.dtype | None = None,
    standard_accuracy: float | None = None,
    landmarks: str | Path | None = None,
    boxes: str | Path | None = None,
    attacks: Sequence[str] = (),
    eps: Sequence[float] = (2.0, 8.0),
    attack_images: int = 500,
    filters: bool = False,
    encoder: str | None = None,
    explanations: int = 0,
    most_passes: int | None = None,
    progress: Callable[[int], None] | None = None,
    stage: Callable[[str], None] | None = None,
) -> Measurement:
    """Measure a plain or differentiated model on images that it was not trained on.

    The images are passed through the model once; more often for files and attacks, and where the head needs more than
    the pooled features when filters are removed.

    Args:
        model: A timm classifier; left as found.
        loader: Yields (images, class indices), in the same order every time. For ``landmarks`` and ``boxes`` a loader
            of timm's, whose data set knows the names of its files.
        groups: Names of groups (``timm_csg.numbers.GROUPS``) or of single numbers; None: the groups that need no more
            than images and labels. Those whose option is given come on top.
        num_classes: Number of classes; None: the model's.
        seed: Of everything random: the noise and halves of the mutual information, splits, attacks.
        amp_dtype: Autocast dtype; None: no autocast.
        standard_accuracy: Of standard training on the same images, for the verdict; None: not known.
        landmarks: CSV or JSON file, for the group ``parts``.
        boxes: CSV or JSON file, for the group ``localisation``.
        attacks: ``"fgsm"`` and ``"pgd"``, for the group ``adversarial``.
        eps: Their strengths in grey levels of 255.
        attack_images: How many images are attacked, spread evenly over the data.
        filters: Whether to measure the group ``filters``: contrastiveness and SID@5; ``encoder`` asks for it too.
        encoder: Name of a timm model whose embeddings MonoScore is measured with; None: no MonoScore.
        explanations: On how many images, spread evenly, explanation maps are judged, the group ``explanations``.
        most_passes: Classes up to which a head that is not linear runs once for each of them; beyond, what removing
            filters does is not measured. None: no limit.
        progress: Called with the number of images after each batch.
        stage: Called with the name of what is measured next: ``"images"`` (the first pass), then each group.

    Returns:
        The numbers, tables by class and by filter, and what was seen.

    Raises:
        ValueError: If a group, an attack, a number or a file is wrong.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))]
        >>> list(measure(model, loader, ["accuracy"]).numbers)[:4]
        ['accuracy', 'gated_accuracy', 'gated_accuracy_uses_labels', 'accuracy_interval']
    """
    options: dict[str, Any] = {"landmarks": landmarks, "boxes": boxes, "attacks": list(attacks), "eps": list(eps)}
    options |= {"attack_images": attack_images, "filters": filters or bool(encoder), "encoder": encoder}
    options["explanations"] = explanations
    chosen = choose(groups, options)
    if not 0 <= (-1 if whole(seed) is None else seed) < 2**32:
        raise ValueError(f"seed must be a whole number, 0 or more and below 2**32, but is {seed!r}.")
    check_files(options)
    classes: Any = model.num_classes if num_classes is None else num_classes
    if (whole(classes) or 0) < 1:
        raise ValueError(f"{type(model).__name__} has no classes to measure (num_classes is {classes!r}).")
    progress, stage = progress or (lambda images: None), stage or (lambda name: None)
    stage("images")
    seen = collect(model, loader, amp_dtype=amp_dtype, progress=progress)
    subject = Subject(
        model,
        loader,
        seen,
        int(classes),
        seed,
        amp_dtype,
        standard_accuracy,
        options,
        most_passes,
        progress,
    )
    numbers: dict[str, Any] = {}
    for group, keys in chosen.items():
        stage(group)
        numbers |= {key: _plain(MEASURES[key](subject)) for key in keys}
    by_class, by_filter = (_columns(table, chosen, subject) for table in (CLASS_COLUMNS, FILTER_COLUMNS))
    return Measurement(numbers, by_class, by_filter, subject)


def _columns(
    table: Iterable[tuple[str, str, Measure]], chosen: Mapping[str, Sequence[str]], subject: Subject
) -> dict[str, Tensor]:
    """Those of no group, and of groups that are measured as a whole."""
    sizes = Counter(number.group for number in NUMBERS)
    whole_groups = {"", *(group for group, keys in chosen.items() if len(keys) == sizes[group])}
    wanted = {name: of for name, group, of in table if group in whole_groups}
    return {name: values for name, of in wanted.items() if (values := of(subject)) is not None}


def choose(names: Sequence[str] | None, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of the numbers to measure, by group.

    Args:
        names: Of groups or numbers; None: all groups that need no option.
        options: Value of each option that a group can need; empty or None where it is not given.

    Raises:
        ValueError: If a name or an attack is unknown, an option is out of range, or one that a group needs is missing.

    Example:
        >>> choose(["gate_density"], {}), list(choose(["gate"], {"boxes": "boxes.csv"}))
        ({'gate': ['gate_density']}, ['gate', 'localisation'])
    """
    _check(options)
    given = {name for name, value in options.items() if value} | ({"filters"} if options.get("encoder") else set())
    groups_of = {number.key: number.group for number in NUMBERS} | {name: name for name in GROUPS}
    if isinstance(names, str):
        raise TypeError(f"groups must be a list of names, [{names!r}], but is a string.")
    if names is not None and not names:
        raise ValueError(f"no group of metrics is named; there are {', '.join(GROUPS)}.")
    for name in names or ():
        if name not in groups_of:
            listed = ", ".join(GROUPS)
            raise ValueError(f"there is no group of metrics {name!r}; there are {listed}.{nearest(name, groups_of)}")
        needs = GROUPS[groups_of[name]].needs
        if needs and needs not in given:
            raise ValueError(f"the metrics {name!r} need --{needs}, in Python {needs}=...")
    on = {name for name, group in GROUPS.items() if (group.needs in given if group.needs else names is None)}
    on |= set(names or ())
    found: dict[str, list[str]] = {}
    for number in sorted(NUMBERS, key=lambda number: list(GROUPS).index(number.group)):
        if on & {number.key, number.group}:
            found.setdefault(number.group, []).append(number.key)
    return found


def _check(options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options.get("attacks") or ()) - set(ATTACKS))
    if unknown:
        raise ValueError(f"unknown attack {', '.join(unknown)}; known are {', '.join(ATTACKS)}.")
    bad = [value for value in options.get("eps") or () if not 0 < value <= 255]
    if bad:
        raise ValueError(f"eps takes strengths in grey levels, more than 0 and at most 255, but has {bad[0]}.")
    encoder = options.get("encoder")
    if encoder and ":" not in encoder and not timm.is_model(encoder.partition(".")[0]):
        raise ValueError(f"timm has no model {encoder!r} for the encoder.{nearest(encoder, timm.list_models())}")
    if options.get("explanations", 0) < 0:
        raise ValueError(f"explanations must be a number of images, 0 for none, but is {options['explanations']}.")
    if options.get("attack_images", 1) < 1:
        raise ValueError(f"attack_images must be at least 1, but is {options['attack_images']}.")


def _plain(value: Any) -> Any:
    """A value for JSON: scalars as floats, None where there is none."""
    if isinstance(value, Tensor):
        value = float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
