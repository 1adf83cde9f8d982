"""``timm-csg evaluate``: any number of models side by side on one data set.

::

    folder/
      metrics.json                 every number, the same keys for every model
      classes_<model>.csv          one line for each class
      filters_<model>.csv          one line for each filter
      gate_<model>.csv, mutual_information_<model>.csv    with --csv: one line for each class, a column for each filter
      figures/*.png                gates and mutual information
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from timm_csg.cli.checkpoint_data import check_data_options, load_checkpoint_and_data
from timm_csg.cli.checkpoints import import_plugins
from timm_csg.cli.contestants import expand, settings_for
from timm_csg.cli.results import write_json, write_matrices, write_tables
from timm_csg.cli.runs import folder_for_results
from timm_csg.cli.terminal import make_console, say
from timm_csg.measuring import Measurement, measure
from timm_csg.measuring.measurement import choose
from timm_csg.version import __version__

_VERSIONS = {
    "timm_csg": __version__,
    "timm": timm.__version__,
    "torch": str(torch.__version__),
    "scikit-learn": sklearn.__version__,
}


def evaluate(
    checkpoints: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    landmarks: str | Path | None = None,
    boxes: str | Path | None = None,
    attacks: Sequence[str] = (),
    eps: Sequence[float] = (2.0, 8.0),
    attack_images: int = 500,
    explanations: int = 0,
    filters: bool = False,
    encoder: str | None = None,
    output: Path | None = None,
    csv: bool = False,
    plugins: Sequence[str] = (),
    seed: int = 0,
    console: Console | None = None,
    quiet: bool = True,
    **data_options: Any,
) -> dict[str, Any]:
    """Measure models on the same images; what ``timm-csg evaluate`` calls.

    Args:
        checkpoints: Folders made by ``save_pretrained``, plain timm folders, Hub repositories, timm names; the folder
            of a ``timm-csg train`` run stands for every model in it.
        groups: What is measured, as in ``timm_csg.measuring.measure``; so the options up to ``attack_images``.
        landmarks: As in ``measure``.
        boxes: As in ``measure``.
        attacks: As in ``measure``.
        eps: As in ``measure``.
        attack_images: As in ``measure``.
        explanations: As in ``measure``.
        filters: As in ``measure``.
        encoder: As in ``measure``.
        output: Folder for ``metrics.json``, tables and figures; None: nothing is written.
        csv: Whether to write gate and mutual information of every class and filter, too, as CSV files into ``output``.
        plugins: Python files or modules to import first, for example one that registers a model.
        seed: As in ``measure``.
        console: For progress; None: the terminal.
        quiet: No progress.
        **data_options: ``data``, ``data_dir``, ``val_split``, ``img_size``, ``batch_size``, ``device``, ... as in
            ``TrainSettings``; left out: those of the run that a checkpoint lies in, or the digits.

    Returns:
        What ``metrics.json`` holds: ``data``, ``split``, ``images``, ``classes``, ``seed``, ``versions``, and under
        ``checkpoints`` the values of every model, None where a metric does not apply.

    Raises:
        ValueError: If an option is wrong, or a model has other classes than the data.
        CheckpointError, HubError: If a checkpoint cannot be loaded.
    """
    check_data_options(data_options)
    options: dict[str, Any] = {"landmarks": landmarks, "boxes": boxes, "attacks": list(attacks)}
    options |= {"filters": filters or bool(encoder), "encoder": encoder, "explanations": explanations}
    strengths: dict[str, Any] = {"eps": list(eps), "attack_images": attack_images}
    chosen = choose(groups, options | strengths)
    import_plugins(plugins)
    named = expand(checkpoints)
    settings = settings_for(named, data_options)
    loaded = {label: load_checkpoint_and_data(named[label], settings[label]) for label in named}
    first = next(iter(named))
    results: dict[str, Any] = {
        "data": short_name(settings[first].data),
        "split": settings[first].val_split,
        "images": None,
        "classes": loaded[first].class_names,
        "seed": seed,
        "metrics": list(chosen),
        "options": {
            key: short_name(value) if isinstance(value, (str, Path)) else value
            for key, value in (options | (strengths if attacks else {})).items()
        },
        "versions": _VERSIONS,
        "checkpoints": {},
    }
    console = make_console() if console is None else console
    place = nullcontext() if output is None else folder_for_results(output)
    with place, _Bar(console, len(named), quiet=quiet) as bar:
        for label, checkpoint in named.items():
            start = time.perf_counter()
            model, loader, class_names = loaded.pop(label)
            stage = partial(bar.stage, label, len(loader.dataset) if hasattr(loader, "dataset") else None)
            found = measure(model, loader, groups, seed=seed, **options, **strengths, progress=bar.tick, stage=stage)
            seconds = round(time.perf_counter() - start, 1)
            results["images"] = len(found.subject.seen.targets)
            results["checkpoints"][label] = _about(found, checkpoint) | found.numbers | {"seconds": seconds}
            if output is not None:
                write_tables(found, class_names, label, output)
                if csv:
                    write_matrices(found, class_names, label, output)
                write_json(results, output / "metrics.json")
    return results


def _about(found: Measurement, checkpoint: str) -> dict[str, Any]:
    """What was measured."""
    model: Any = found.subject.model
    mechanism = getattr(model, "mechanism", None)
    return {
        "checkpoint": checkpoint,
        "architecture": getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "filters": found.subject.seen.features.shape[1],
        "mechanism": None if mechanism is None else mechanism.name,
        "mechanism_options": None if mechanism is None else mechanism.config.to_dict(),
    }


def short_name(value: Any) -> str:
    """A path without the folders above it; other names as they are."""
    text = str(value)
    return Path(text).name if text.startswith(("folder:", "/", ".")) or Path(text).exists() else text


class _Bar:
    """Which model, which metric, how many images: a bar on a terminal, else plain lines; silent where ``quiet``."""

    def __init__(self, console: Console, models: int, *, quiet: bool) -> None:
        self.models, self.quiet, self.is_live = models, quiet, console.is_terminal and not quiet
        self.seen: list[str] = []
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, expand=True, transient=True)
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> _Bar:
        if self.is_live:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def stage(self, label: str, images: int | None, name: str) -> None:
        """A metric begins."""
        if label not in self.seen:
            self.seen.append(label)
        which = f"{len(self.seen)}/{self.models} " if self.models > 1 else ""
        self.progress.reset(self.task, total=images, description=f"{which}{label}: {name}")
        if not self.is_live and not self.quiet:
            say(f"measuring {which}{label}: {name}")

    def tick(self, images: int) -> None:
        """Images are done."""
        self.progress.advance(self.task, images)
