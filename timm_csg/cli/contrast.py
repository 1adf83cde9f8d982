"""``timm-csg explain --against``: what decides between two classes, as a table and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from timm_csg.explain import Contrast, PredictionExplanation, contrast
from timm_csg.pictures import shown


def versus_class(model: nn.Module, image: Tensor, why: PredictionExplanation, against: int, top: int) -> Contrast:
    """What decides between the explained class and another one.

    Args:
        model: The model.
        image: [1, channels, height, width].
        why: The class that is explained; where it is ``against`` itself, the most probable other class takes its place.
        against: The other class.
        top: Filters, as many as there are at most.
    """
    one = why.target
    if one == against:
        logits: Any = model(image).detach()[0]
        logits[against] = -float("inf")
        one = int(logits.argmax())
    return contrast(model, image, one, against, top=min(top, int(model.num_features)))  # type: ignore[arg-type]


def contrast_table(found: Sequence[Any], title: str = "") -> Table:
    """The filters that decide between two classes in each image, whose they are, and how the difference comes about.

    Args:
        found: What ``timm_csg.cli.explain.explain`` returned, with ``against``.
        title: What the model is called.
    """
    table = Table(title=Text(f"Which of two, by {title}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("image", "rather than"):
        table.add_column(name, overflow="fold")
    for name in ("filter", "owner", "adds", "decides"):
        table.add_column(name, justify="right", no_wrap=name != "owner")
    for each in found:
        outcome, name = each.versus, each.why.name
        added, deciding = outcome.contribution[0], outcome.deciding[0]
        filters = outcome.filters[0].tolist()
        for place, index in enumerate(filters):
            table.add_row(
                Text(shown(each.image.name)) if place == 0 else "",
                Text(" / ".join(map(name, outcome.classes))) if place == 0 else "",
                str(index),
                "–" if outcome.owner is None or outcome.owner[index] < 0 else Text(name(int(outcome.owner[index]))),
                f"{float(added[index]):+.2f}",
                "yes" if bool(deciding[index]) else "",
            )
        others = float(added.sum() - added[filters].sum())
        table.add_row("", "", "others", "", f"{others:+.2f}", f"{int(deciding.sum())} in all")
        table.add_row("", "", "no filter", "", f"{float(outcome.constant[0]):+.2f}", "")
        total = f"{float(outcome.difference[0]):+.2f}"
        table.add_row("", "", "difference", "", total, "", style="bold")
        table.add_section()
    notes = [
        "adds: to the difference of the two scores; above 0 it speaks for the first class.",
        "decides: the fewest filters without which the class that is ahead would not be.",
    ]
    if any(not each.versus.exact for each in found):
        notes.append("This model's head is not linear: what a filter adds is an estimate, gradient times response.")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table
