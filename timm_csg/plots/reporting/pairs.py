"""The two-class page of the report: what decided between two classes in wrong answers, the largest confusions first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_csg import explain
from timm_csg.plots.colours import filter_colour
from timm_csg.plots.reporting.book import Book, Tile
from timm_csg.plots.reporting.pictures import displayable, fetch_images

PAIRS = 12
_TOP = 5


class Part(NamedTuple):
    """One line of a contrast.

    Attributes:
        filter: Its number; -1: all other filters together, -2: what no filter adds.
        owner: The name of its class; empty for -1 and -2.
        colour: ``"#rrggbb"``, the same wherever the filter is drawn.
        adds: To the difference of the two logits.
        decides: Whether it is one of the fewest without which the answer would turn.
    """

    filter: int
    owner: str
    colour: str
    adds: float
    decides: bool


@dataclass(frozen=True, eq=False)
class Pair:
    """A class that is taken for another, and what decided in the most certain of these answers.

    Attributes:
        label: The true class.
        taken: The answer.
        images: How many images.
        shown: The number of the image that is shown.
        difference: Logit of the answer minus that of the true class.
        parts: The filters that add most, all others, and the constant.
        deciding: How many filters decide.
        exact: Whether the parts are what the logits are made of.
        tiles: The image under what speaks for the answer, and under what speaks for the true class.
    """

    label: int
    taken: int
    images: int
    shown: int
    difference: float
    parts: list[Part]
    deciding: int
    exact: bool
    tiles: tuple[Tile, Tile]

    @property
    def largest(self) -> float:
        """The longest bar."""
        return max(abs(part.adds) for part in self.parts) or 1.0


def make_pairs(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], book: Book) -> list[Pair]:
    """The most frequent confusions of shown classes, with one answer of each.

    Args:
        model: The model of the report.
        loader: Its images.
        book: What else the report shows; gets the pictures.
    """
    findings = book.findings
    confusions = [found for found in findings.confusions() if {*found[:2]} <= {*book.classes}][:PAIRS]
    shown = []
    for label, taken, _ in confusions:
        is_one = (findings.targets == label) & (findings.predictions == taken)
        shown.append(int(findings.confidence.masked_fill(~is_one, -1).argmax()))
    if not shown:
        return []
    images = fetch_images(loader, shown, findings.targets)
    book.pictures.images.update({number: displayable(image, model) for number, image in images.items()})
    return [
        _pair(model, book, images[number][None], number, *confusion)
        for number, confusion in zip(shown, confusions, strict=True)
    ]


def _pair(model: nn.Module, book: Book, image: Tensor, shown: int, label: int, taken: int, images: int) -> Pair:
    top = min(_TOP, len(book.findings.owners))
    found = explain.contrast(model, image, taken, label, top=top, upsample=False)
    added, filters = found.contribution[0], found.filters[0].tolist()
    parts = [
        Part(index, book.owner(index), filter_colour(index), float(added[index]), bool(found.deciding[0, index]))
        for index in filters
    ]
    parts.append(Part(-1, "", "#999999", float(added.sum() - added[filters].sum()), False))
    parts.append(Part(-2, "", "#cccccc", float(found.constant[0]), False))
    heat = None if found.map is None else found.map[0].cpu()
    tiles = (_tile(book, shown, heat, taken), _tile(book, shown, None if heat is None else -heat, label))
    deciding = int(found.deciding[0].sum())
    return Pair(label, taken, images, shown, float(found.difference[0]), parts, deciding, found.exact, tiles)


def _tile(book: Book, shown: int, heat: Tensor | None, speaks_for: int) -> Tile:
    """The image under what speaks for one of the two classes."""
    name, positive = book.names[speaks_for], None if heat is None else heat.clamp(min=0).to(torch.float32)
    return book.draw(shown, positive, f"what speaks most for {name} lies", f"for {name}", is_own=False)
