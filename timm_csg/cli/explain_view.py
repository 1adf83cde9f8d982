"""What ``timm-csg explain`` prints: the filters behind each answer; with ``--against``, those between two classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from timm_csg.cli.explain import Explained
from timm_csg.pictures import shown


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=name != "owner")
    return table


def explanation_table(found: list[Explained], title: str = "") -> Table:
    """Why each image was given its class: its filters, what they own, and how much of the evidence they gave."""
    numbers = ("proba-\nbility", "filter", "gate", "response", "contri-\nbution", "share")
    table = _table(f"Why, by {title}", ("image", "class"), numbers)
    for each in found:
        owned = each.why.standard.owned_share
        for place, evidence in enumerate(each.why.filters):
            first = place == 0
            table.add_row(
                Text(shown(each.image.name)) if first else "",
                Text(each.answer) if first else "",
                f"{each.why.probability:.1%}" if first else "",
                str(evidence.filter),
                "–" if evidence.gate is None else f"{evidence.gate:.2f}",
                f"{evidence.activation:.3g}",
                f"{evidence.contribution:+.2f}",
                f"{evidence.share:.1%}",
            )
        if owned is not None:
            table.add_row("", "", "", "all its own", "", "", "", f"{owned:.1%}", style="bold")
        table.add_section()
    notes = [
        "contribution: what the filter adds to the score of the class.",
        "share: of everything that speaks for the class in this image.",
    ]
    if any(not each.why.standard.exact for each in found):
        notes.append("This model's head is not linear: contribution and share are estimates, gradient times response.")
    table.caption = "\n".join(notes)
    return table


def contrast_table(found: list[Explained], title: str = "") -> Table:
    """The filters that decide between two classes in each image, whose they are, and how the difference comes about."""
    table = _table(f"Which of two, by {title}", ("image", "rather than"), ("filter", "owner", "adds", "decides"))
    for each in found:
        outcome: Any = each.versus  # there is one, where another class was named
        name = each.why.name
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
    if any(each.versus is not None and not each.versus.exact for each in found):
        notes.append("This model's head is not linear: what a filter adds is an estimate, gradient times response.")
    table.caption = "\n".join(notes)
    return table
