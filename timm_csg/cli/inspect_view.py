"""What ``timm-csg inspect`` prints for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from timm_csg.mechanisms.registry import resolve_config
from timm_csg.numbers import NUMBERS

_HEADS = {
    "linear": "pooling, then a linear layer: each filter contributes to a class directly",
    "pooled": "more than a linear layer after the pooling: a filter's meaning depends on the others",
    "map": "more than pooling before the classifier: a filter's meaning depends on the others and on the position",
}
_MOST_CLASSES = 20
_MOST_RANGES = 40  # of filters, for one class


def inspection_view(found: dict[str, Any]) -> RenderableType:
    """The facts of ``inspect`` as lines of a label and what belongs to it."""
    channels, height, width = found["input_size"]
    title = Text(found["name"], style="bold", overflow="fold")
    source = "" if found["source"] == "timm" else f"{found['source']} of {found['architecture']}, "
    shape = f"{found['num_classes']:,} classes, input {channels} x {height} x {width}"
    title.append(f"\n{source}{_amount(found['parameters'])} parameters, {shape}", style="not bold")
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(no_wrap=True, style="bold")
    lines.add_column()
    if not found["supported"]:
        lines.add_row("Not supported", Text(found["refused"]))
        return Group(title, "", lines)
    lines.add_row("Last stage", _stage(found["stage"]))
    lines.add_row("Head", _head(found["head"]))
    if "differentiated" not in found:
        lines.add_row("Mechanisms", _verdicts(found["mechanisms"], found["parameters"]))
    lines.add_row("Explanations", _verdicts(found["explanations"], found["parameters"]))
    if "differentiated" in found:
        _add_mechanism(lines, found["differentiated"], found)
    return Group(title, "", lines)


def _stage(stage: dict[str, Any]) -> Text:
    grid = "tokens without a grid" if stage["grid"] is None else f"a grid of {stage['grid'][0]} x {stage['grid'][1]}"
    sign = "values of both signs" if stage["signed"] else "values 0 or more"
    return Text(f"{stage['name']}: {stage['num_filters']:,} filters ({stage['layout']}) on {grid}, {sign}")


def _head(head: dict[str, Any]) -> Text:
    layer = head["classifier"]
    ends = re.search(r"in_features=(\d+), out_features=(\d+)|\((\d+), (\d+)", layer["layer"])
    sizes = [f"{int(size):,}" for size in ends.groups() if size] if ends else []
    kind = layer["layer"].partition("(")[0]
    more = f"\nclassifier: {layer['name']}, {kind} {' to '.join(sizes)}".rstrip()
    return Text(f"{head['kind']}: {_HEADS[head['kind']]}{more}")


def _verdicts(verdicts: list[dict[str, Any]], parameters: int) -> RenderableType:
    """What applies in one line; what does not, with its reason, in one line for each reason."""
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(no_wrap=True)
    lines.add_column()
    applying = [found["name"] + _cost(found.get("parameters"), parameters) for found in verdicts if found["applies"]]
    lines.add_row(Text("yes", style="green"), Text(", ".join(applying) or "none"))
    refused = [verdict for verdict in verdicts if not verdict["applies"]]
    for reason, group in groupby(sorted(refused, key=_reason), key=_reason):
        names = ", ".join(verdict["name"] for verdict in group)
        lines.add_row(Text("no", style="red"), Text(f"{names}: {reason}"))
    return lines


def _cost(added: int | None, parameters: int) -> str:
    if added is None:
        return ""
    return f" (+ {added:,} parameters, {added / parameters:.1%})" if added else " (adds no parameters)"


def _reason(verdict: dict[str, Any]) -> str:
    return str(verdict["reason"])


def _add_mechanism(lines: Table, own: dict[str, Any], found: dict[str, Any]) -> None:
    default = resolve_config(own["mechanism"], {})[1].to_dict()
    changed = [f"{name}={value}" for name, value in own["config"].items() if value != default.get(name)]
    lines.add_row("Mechanism", Text(f"{own['mechanism']}, {own['parameters']:,} parameters"))
    lines.add_row("Options", Text(", ".join(changed) or "all defaults"))
    if own["metrics"]:
        lines.add_row("Measured", Text(_measured(own["metrics"])))
    if own["owners"] is not None:
        classes = found["num_classes"]
        least = f"(at {1 / classes:.3f}, 1 / classes, every filter serves one class)"
        lines.add_row("Density", Text(f"{own['density']:.3f} {least}"))
        lines.add_row("Owners", _owners(own["owners"], own["class_names"] or [str(index) for index in range(classes)]))


def _measured(measured: dict[str, Any]) -> str:
    """One line of where the numbers come from, one of the numbers."""
    context = [
        f"{key} {measured[key]}" for key in ("recipe", "data", "epochs", "seed") if measured.get(key) is not None
    ]
    given = measured.get("gated_accuracy_uses_labels") is True
    labels = {"gated_accuracy": "gated with the label given"} if given else {}
    values = [
        f"{labels.get(number.key, number.label.strip())} {measured[number.key]:.{number.places}f}"
        for number in NUMBERS
        if number.head and number.label and isinstance(measured.get(number.key), (int, float))
    ]
    return "\n".join(filter(None, (", ".join(context), ", ".join(values))))


def _owners(owners: Sequence[int], names: Sequence[str]) -> Table:
    """Classes with how many filters they own, and which."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("class", overflow="fold", max_width=24)
    table.add_column("own", justify="right")
    table.add_column("filters")
    for index, name in enumerate(names[:_MOST_CLASSES]):
        filters = [number for number, owner in enumerate(owners) if owner == index]
        table.add_row(Text(name), str(len(filters)), Text(_ranges(filters) or "none"))
    if len(names) > _MOST_CLASSES:
        table.add_row(f"and {len(names) - _MOST_CLASSES} more", "", "see --json")
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    shown = ", ".join(parts[:_MOST_RANGES])
    left = sum(map(len, runs[_MOST_RANGES:]))
    return f"{shown} and {left:,} more" if left else shown


def _amount(count: int) -> str:
    """A count that is short to read: 11.7 M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
