"""The terminal: live progress while training, a table at the end."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class LiveDisplay:
    """A progress bar over all trainings and a line for the newest epoch of each; silent where ``quiet``.

    Args:
        console: Where to write.
        recipes: Names of the trainings in their order.
        steps: Training batches of all of them together.
        quiet: Show nothing.
    """

    def __init__(self, console: Console, recipes: list[str], steps: int, *, quiet: bool) -> None:
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in recipes}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            "{task.percentage:>3.0f}%",
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task("training", total=steps)
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self.quiet = quiet
        self.name = ""

    def __enter__(self) -> LiveDisplay:
        if not self.quiet:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.quiet:
            self.live.stop()

    def start(self, name: str, epochs: int, history: list[dict[str, Any]], steps_per_epoch: int) -> None:
        """A training begins, or goes on after the epochs in ``history``."""
        self.name = name
        self.rows[name] = {"epochs": epochs, **(history[-1] if history else {"epoch": -1})}
        self.progress.advance(self.task, len(history) * steps_per_epoch)

    def batch(self, path: str) -> None:
        """A batch is done."""
        row = self.rows[self.name]
        row["path"] = path
        self.progress.update(self.task, advance=1, description=f"{self.name}, epoch {row['epoch'] + 2}")

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done."""
        self.rows[self.name] |= row

    def note(self, text: str) -> None:
        """What happens between trainings."""
        self.progress.update(self.task, description=text)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("training", "epoch", "path", "loss", "accuracy", "gated accuracy", "density"):
            table.add_column(column, justify="left" if column in ("training", "path") else "right")
        for name, row in self.rows.items():
            done = f"{row['epoch'] + 1}/{row['epochs']}" if row else "waiting"
            cells = [_number(row.get(key), places) for key, places in (("loss", 3), ("accuracy", 4))]
            gate = [_number(row.get(key), places) for key, places in (("gated_accuracy", 4), ("density", 3))]
            table.add_row(name, done, row.get("path", ""), *cells, *gate)
        return Group(table, self.progress)


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """The final table, one line for each training."""
    table = Table(
        title="On the validation images",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("training", no_wrap=True)
    for column in ("accu-\nracy", "gated", "MIS", "den-\nsity", "owner\nagrees", "class\nw/o", "others", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in results.items():
        gated = _number(result["gated_accuracy"], 4) + ("†" if result["gated_accuracy_uses_labels"] else "")
        table.add_row(
            name,
            _number(result["accuracy"], 4),
            gated,
            _number(result["mutual_information_score"], 4),
            _number(result["gate_density"], 3),
            _number(result["owner_agreement"], 2),
            _number(result["class_without_its_filters"], 3),
            _number(result["other_classes"], 3),
            f"{result['seconds']:.0f} s",
        )
    bound = max((result["mutual_information_bound"] for result in results.values()), default=float("nan"))
    notes = [
        "gated: accuracy of the gated path.  time: seconds of training.",
        f"MIS: mutual-information score in nats, at most {bound:.3f} here.  density: mean gate, at least 1 / classes.",
        "owner agrees: share of filters whose gate class is the class they tell most about.",
        "class w/o: accuracy of a class without its own filters; others: of the other classes meanwhile.",
    ]
    if any(result["gated_accuracy_uses_labels"] for result in results.values()):
        notes.append("† the label gate is given the true label: this says nothing about new images.")
    if any(result["filter_owners_by"] == "mutual information" for result in results.values()):
        notes.append("standard has no gate: there a filter's class is the one it tells most about.")
    caption = "\n".join(notes)
    table.caption, table.caption_justify = caption, "left"
    return table


def _number(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"
