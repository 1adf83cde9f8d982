"""What of the findings goes into the report: classes, filters, images and maps, within limits that keep it small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg import explain
from timm_csg.explain import PathEvidence
from timm_csg.plots.reporting.findings import Findings
from timm_csg.plots.reporting.pictures import Pictures, displayable, fetch_images

_BATCH = 32


@dataclass(frozen=True)
class Limits:
    """How much the report shows.

    Attributes:
        classes: Classes with a page of their own.
        filters: Filters with a page of their own.
        strongest: Images on a filter's page.
        explained: Explained images of all classes together.
        pictures: Bytes of all thumbnails together.
    """

    classes: int = 100
    filters: int = 256
    strongest: int = 9
    explained: int = 80
    pictures: int = 4_500_000

    def tighter(self) -> Limits:
        """The next smaller report."""
        return Limits(
            classes=max(10, self.classes // 2),
            filters=max(16, self.filters // 2),
            strongest=max(3, self.strongest - 2),
            explained=max(12, self.explained // 2),
            pictures=self.pictures * 2 // 3,
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """One explained image.

    Attributes:
        image: Its number, the place in the loader's order.
        label: The true class.
        predicted: The class that was answered.
        confidence: Its probability.
        evidence: The filters behind the predicted class.
        missing: The filters behind the true class, where the answer was wrong.
        heat: Grad-CAM of the predicted class on the grid of the stage; None without a grid.
    """

    image: int
    label: int
    predicted: int
    confidence: float
    evidence: PathEvidence
    missing: PathEvidence | None
    heat: Tensor | None

    @property
    def is_right(self) -> bool:
        """Whether the answer is the true class."""
        return self.label == self.predicted


class Tile(NamedTuple):
    """A thumbnail with a heat map.

    Attributes:
        image: Style-sheet class of the thumbnail.
        heat: Style-sheet class of the map; empty where nothing responds, and without a grid.
        words: What a person who cannot see it is told.
        caption: The image's class.
        is_own: Whether that is the class of the filter.
    """

    image: str
    heat: str
    words: str
    caption: str
    is_own: bool


@dataclass(frozen=True, eq=False)
class Book:
    """Everything that the pages show.

    Attributes:
        findings: What was found out.
        names: Name of each class.
        title: Of the report.
        architecture: The model's name in timm.
        reference: A name and the numbers of a model to compare with; None: there is none.
        classes: The classes with a page.
        filters: The filters with a page.
        limits: What decided that.
        pictures: Thumbnails and maps.
        answers: Explained images by number.
        maps: Map of a filter in an image, by image and filter, on the grid of the stage.
        scales: The largest value on any map of a filter.
    """

    findings: Findings
    names: list[str]
    title: str
    architecture: str
    reference: tuple[str, dict[str, Any]] | None
    classes: list[int]
    filters: list[int]
    limits: Limits
    pictures: Pictures
    answers: dict[int, Answer]
    maps: dict[tuple[int, int], Tensor]
    scales: dict[int, float]

    def tile(self, image: int, index: int) -> Tile:
        """An image under the map of a filter."""
        label, heat = int(self.findings.targets[image]), self.maps.get((image, index))
        lies, is_own = f"filter {index} responds most", label == int(self.findings.owners[index])
        return self.draw(image, heat, lies, self.names[label], is_own, self.scales.get(index))

    def answer_tile(self, answer: Answer) -> Tile:
        """An explained image under Grad-CAM of its answer."""
        lies = f"the evidence for {self.names[answer.predicted]} lies"
        return self.draw(answer.image, answer.heat, lies, self.names[answer.label], answer.is_right)

    def draw(
        self, image: int, heat: Tensor | None, lies: str, caption: str, is_own: bool, scale: float | None = None
    ) -> Tile:
        """An image under a map [map height, map width]; ``lies`` begins the sentence that says where its peak is."""
        name = "" if heat is None else self.pictures.heat(heat, scale)
        words = f"Image {image}, {self.names[int(self.findings.targets[image])]}"
        if heat is not None:
            words += f"; {lies} at the {place_in_words(heat)}" if name else "; the map is empty"
        return Tile(self.pictures.image(image), name, words, caption, is_own)

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Height and width of the maps; None without maps."""
        return next((tuple(heat.shape) for heat in self.maps.values()), None)

    def owner(self, index: int) -> str:
        """The name of a filter's class."""
        owner = int(self.findings.owners[index])
        return self.names[owner] if owner >= 0 else "no class"

    def answers_of(self, label: int) -> list[Answer]:
        """The explained images of a class."""
        return [answer for answer in self.answers.values() if answer.label == label]

    def face(self, label: int) -> str:
        """The style-sheet class of an image that stands for a class, a recognised one if there is one."""
        answers = sorted(self.answers_of(label), key=lambda answer: not answer.is_right)
        return self.pictures.image(answers[0].image) if answers else "none"

    def strongest(self, index: int) -> list[int]:
        """The images that drive a filter most, as many as are shown."""
        return [] if self.findings.silent[index] else self.findings.strongest[index, : self.limits.strongest].tolist()


def make_book(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    findings: Findings,
    names: list[str],
    title: str | None,
    reference: tuple[str, dict[str, Any]] | None,
    limits: Limits,
) -> Book:
    """Choose what is shown, and make its pictures, maps and explanations.

    Raises:
        ValueError: If the loader gives the images in another order than before.
    """
    classes = _choose_classes(findings, limits)
    filters = _choose_filters(findings, classes, limits)
    chosen = _choose_images(findings, classes, limits)
    shown = findings.strongest[filters, : limits.strongest]
    images = fetch_images(loader, chain(chosen, shown.flatten().tolist()), findings.targets)
    answers = {answer.image: answer for answer in _answers(model, images, chosen, findings)}
    wanted: dict[int, set[int]] = {number: set() for number in images}
    for index, row in zip(filters, shown.tolist(), strict=True):
        for number in row:
            wanted[number].add(index)
    for answer in answers.values():
        for evidence in (answer.evidence, answer.missing):
            wanted[answer.image].update(found.filter for found in (evidence.filters if evidence else ()))
    maps = _maps(model, images, wanted)
    scales: dict[int, float] = {}
    for (_, index), heat in maps.items():
        scales[index] = max(scales.get(index, 0.0), float(heat.max()))
    pictures = Pictures({number: displayable(image, model) for number, image in images.items()}, limits.pictures)
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)
    title = title or f"What {architecture} has learned"
    return Book(
        findings, names, title, architecture, reference, classes, filters, limits, pictures, answers, maps, scales
    )


def _choose_classes(findings: Findings, limits: Limits) -> list[int]:
    """All classes, or those with the most images."""
    per_class = findings.confusion.sum(dim=1)
    order = per_class.argsort(descending=True, stable=True)[: limits.classes]
    return sorted(order.tolist())


def _choose_filters(findings: Findings, classes: list[int], limits: Limits) -> list[int]:
    """All filters, or the best of each shown class in turn."""
    if len(findings.owners) <= limits.filters:
        return list(range(len(findings.owners)))
    rounds = zip_longest(*(findings.filters_of(label) for label in classes))
    in_turn = [index for found in rounds for index in found if index is not None]
    return sorted(in_turn[: limits.filters])


def _choose_images(findings: Findings, classes: list[int], limits: Limits) -> list[int]:
    """Of each class the most certain right and wrong answers, the wrong ones first."""
    each = max(1, min(3, limits.explained // (2 * len(classes))))
    right = findings.predictions == findings.targets
    order = findings.confidence.argsort(descending=True, stable=True)
    chosen: list[int] = []
    for wanted in (~right, right):
        by_class = [order[(wanted & (findings.targets == label))[order]][:each].tolist() for label in classes]
        in_turn = [number for found in zip_longest(*by_class) for number in found if number is not None]
        chosen += in_turn[: limits.explained // 2]
    return chosen


def _batches(images: dict[int, Tensor], numbers: Iterable[int]) -> Iterator[tuple[list[int], Tensor]]:
    numbers = list(numbers)
    for start in range(0, len(numbers), _BATCH):
        part = numbers[start : start + _BATCH]
        yield part, torch.stack([images[number] for number in part])


def _answers(model: nn.Module, images: dict[int, Tensor], chosen: list[int], findings: Findings) -> Iterator[Answer]:
    top = min(3, len(findings.owners))
    for numbers, batch in _batches(images, chosen):
        predicted, labels = findings.predictions[numbers], findings.targets[numbers]
        standard = explain.explain_prediction(model, batch, predicted, top=top)
        missing = explain.explain_prediction(model, batch, labels, top=top)
        heat = _grad_cam(model, batch, predicted)
        for place, number in enumerate(numbers):
            wrong = predicted[place] != labels[place]
            yield Answer(
                number,
                int(labels[place]),
                int(predicted[place]),
                float(findings.confidence[number]),
                standard[place].standard,
                missing[place].standard if wrong else None,
                None if heat is None else heat[place],
            )


def _grad_cam(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor | None:
    try:
        return explain.grad_cam(model, images, targets, upsample=False).cpu()
    except ValueError:  # no grid, or a head that reads one token only
        return None


def _maps(model: nn.Module, images: dict[int, Tensor], wanted: dict[int, set[int]]) -> dict[tuple[int, int], Tensor]:
    found: dict[tuple[int, int], Tensor] = {}
    for numbers, batch in _batches(images, sorted(wanted)):
        try:
            maps = explain.filter_maps(model, batch, upsample=False).cpu()
        except ValueError:  # tokens without a grid
            return {}
        for place, number in enumerate(numbers):
            found |= {(number, index): maps[place, index].clone() for index in sorted(wanted[number])}
    return found


def place_in_words(heat: Tensor) -> str:
    """Where the largest value of a map is, in words.

    Example:
        >>> place_in_words(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        'right'
    """
    height, width = heat.shape
    row, column = divmod(int(heat.argmax()), width)
    vertical = ("upper", "", "lower")[min(2, 3 * row // height)]
    horizontal = ("left", "", "right")[min(2, 3 * column // width)]
    return " ".join(word for word in (vertical, horizontal) if word) or "centre"
