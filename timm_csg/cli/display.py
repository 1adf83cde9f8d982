"""The terminal: live progress while training, a table at the end, and what to make of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from timm_csg.numbers import LABELS_GIVEN, NUMBERS, notes

_IN_AN_EPOCH = {"loss": 3, "accuracy": 4, "gated_accuracy": 4, "density": 3}  # and the places that are shown


class LiveDisplay(Progress):
    """What training does, for people.

    On a terminal a progress bar over all trainings and a line for the newest epoch of each; elsewhere a plain line for
    each epoch; nothing without a console.

    Args:
        console: Where to write; None: nowhere.
        recipes: Names of the trainings in their order.
        steps: Training batches of all of them together.
    """

    def __init__(self, console: Console | None, recipes: list[str], steps: int) -> None:
        self.is_live = console is not None and console.is_terminal
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in recipes}
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            expand=True,
            transient=True,
            disable=not self.is_live,
        )
        self.is_quiet, self.name, self.tells_start = console is None, "", True
        self.training = self.add_task("training", total=steps)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.is_quiet:
            self.console.print(text, soft_wrap=True)

    def begin(self, name: str, epochs: int, history: list[dict[str, Any]], steps_per_epoch: int) -> None:
        """A training begins, or is resumed after the epochs in ``history``."""
        self.name = name
        self.rows[name] = {"epochs": epochs, **(history[-1] if history else {"epoch": -1})}
        steps = (self.tasks[0].total or 0) - len(history) * steps_per_epoch  # the others would count as fast
        self.update(self.training, total=steps)

    def batch(self, path: str) -> None:
        """A batch is done."""
        row = self.rows[self.name]
        row["path"] = path
        self.update(self.training, advance=1, description=f"{self.name}, epoch {row['epoch'] + 2}")
        task = self.tasks[0]
        if not self.is_live and self.tells_start and task.completed >= 3 and (task.elapsed or 0) > 5:
            self.tells_start = False
            self.say(f"{self.name}: the first batches are done, {self._left()}")

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done."""
        self.rows[self.name] |= row
        if self.is_live:
            return
        self.tells_start = False  # each line of an epoch says how much is left
        known = {key: places for key, places in _IN_AN_EPOCH.items() if key in row}
        values = [f"{key.replace('_', ' ')} {row[key]:.{places}f}" for key, places in known.items()]
        epoch = f"{self.name}: epoch {row['epoch'] + 1}/{self.rows[self.name]['epochs']} ({row['path']})"
        self.say(", ".join([epoch, *values, f"{row['seconds']:.0f} s", self._left()]))

    def note(self, text: str) -> None:
        """What happens between trainings."""
        self.update(self.training, description=text)
        if not self.is_live:
            self.say(text)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A pass over pictures before the first epoch, with a bar of its own; call with the number of each batch."""
        if not self.is_live:
            self.say(what)
        task = self.add_task(what, total=total)
        yield lambda count: self.update(task, advance=count)
        self.remove_task(task)

    def _left(self) -> str:
        return f"about {TimeRemainingColumn().render(self.tasks[0])} left"

    def get_renderables(self) -> Iterator[RenderableType]:
        """The newest epoch of each training, above the bars."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("training", "epoch", "path", "loss", "accuracy", "gated accuracy", "density"):
            table.add_column(column, justify="left" if column in ("training", "path") else "right")
        for name, row in self.rows.items():
            done = f"{row['epoch'] + 1}/{row['epochs']}" if row else "waiting"
            cells = [_number(row.get(key), places) for key, places in _IN_AN_EPOCH.items()]
            table.add_row(name, done, row.get("path", ""), *cells)
        yield table
        yield from super().get_renderables()


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """The final table, one line for each training."""
    table = Table(
        title="On the validation images",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown = [number for number in NUMBERS if number.head]
    table.add_column("training", no_wrap=True)
    for head in (*(number.head for number in shown), "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, result in results.items():
        cells = [_number(result[number.key], number.places) for number in shown]
        if result["gated_accuracy_uses_labels"]:
            cells[[number.key for number in shown].index("gated_accuracy")] += "†"
        table.add_row(name, *cells, f"{result['seconds']:.0f} s")
    first: dict[str, Any] = next(iter(results.values()), {})
    facts = {
        "mutual_information_bound": max((result["mutual_information_bound"] for result in results.values()), default=0),
        "least_density": 1 / max(1, len(first.get("filters_per_class", ()))),
    }
    said = [*notes({number.key for number in shown}, facts), "time: seconds of training."]
    if any(result["gated_accuracy_uses_labels"] for result in results.values()):
        said.append(f"† {LABELS_GIVEN}")
    table.caption, table.caption_justify = "\n".join(said), "left"
    return table


def intervals(results: Mapping[str, Mapping[str, Any]], class_names: Sequence[str] | None = None) -> list[str]:
    """A line for each model: its accuracy with an interval; for two and three classes sensitivity and specificity.

    Args:
        results: Numbers by model, as ``metrics.json`` has them.
        class_names: Names of the classes; None: those in the results, or numbers.

    Returns:
        The lines; none for a model whose accuracy was not measured.

    Example:
        >>> intervals({"one": {"accuracy": 0.5, "accuracy_interval": [0.2, 0.8]}})
        ['one: accuracy 0.500 (95 % interval 0.200 to 0.800)']
    """
    lines = []
    for name, found in results.items():
        ends = found.get("accuracy_interval")
        if ends is None:
            continue
        parts = [f"{name}: accuracy {found['accuracy']:.3f} (95 % interval {ends[0]:.3f} to {ends[1]:.3f})"]
        for rate in ("sensitivity", "specificity"):
            rows = found.get(rate)
            if rows:
                names = class_names or found.get("class_names") or list(map(str, range(len(rows))))
                told = [f"{label} {_share(*row)}" for label, row in zip(names, rows, strict=True) if row is not None]
                parts.append(f"{rate}: {', '.join(told)}")
        lines.append("; ".join(parts))
    return lines


def _share(share: float, low: float, high: float) -> str:
    return f"{share:.3f} ({low:.3f} to {high:.3f})"


def verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each training with owners: whether they can be trusted, and what to try if not."""
    judged = {name: result for name, result in results.items() if result.get("verdict")}
    return [" ".join(filter(None, (f"{name}:", r["verdict"], r["verdict_advice"]))) for name, r in judged.items()]


def _number(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"
