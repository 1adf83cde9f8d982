"""``timm-csg evaluate``: any number of models side by side on one data set.

::

    folder/
      metrics.json                 every number, the same keys for every model
      classes_<model>.csv          one line for each class
      filters_<model>.csv          one line for each filter
      figures/*.png                gates and mutual information
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from timm_csg import measuring
from timm_csg.cli.checkpoint_data import (
    CheckpointAndData,
    check_data_options,
    import_plugins,
    load_checkpoint_and_data,
)
from timm_csg.cli.comparison import write_subject
from timm_csg.cli.contestants import expand, settings_for
from timm_csg.cli.groups import choose_groups
from timm_csg.cli.measures import Subject
from timm_csg.cli.measures_optional import ATTACKS
from timm_csg.cli.results import write_json
from timm_csg.cli.runs import folder_for_results
from timm_csg.cli.terminal import make_console, say
from timm_csg.model import is_differentiated
from timm_csg.version import __version__


def evaluate(
    checkpoints: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    landmarks: str | Path | None = None,
    boxes: str | Path | None = None,
    attacks: Sequence[str] = (),
    eps: Sequence[float] = (2.0, 8.0),
    attack_images: int = 500,
    output: Path | None = None,
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
        groups: Names of groups of metrics, see ``GROUPS``; None: those that need no more than images and labels, and
            those whose files or attacks are given.
        landmarks: CSV or JSON file of landmarks, for the groups ``parts``.
        boxes: CSV or JSON file of object boxes, for the group ``localisation``.
        attacks: Names of attacks, ``"fgsm"`` or ``"pgd"``, for the group ``adversarial``.
        eps: Their strengths in grey levels of 255.
        attack_images: How many images are attacked, spread evenly over the data.
        output: Folder for ``metrics.json``, tables and figures; None: nothing is written.
        plugins: Python files or modules to import first, for example one that registers a model.
        seed: Of everything random: the noise and halves of the mutual information, splits, attacks.
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
    if attack_images < 1:
        raise ValueError(f"--attack-images must be at least 1, but is {attack_images}.")
    bad = [value for value in eps if not 0 < value <= 255]
    if bad:
        raise ValueError(f"--eps takes strengths in grey levels, more than 0 and at most 255, but has {bad[0]}.")
    unknown = sorted(set(attacks) - set(ATTACKS))
    if unknown:
        raise ValueError(f"unknown attack {', '.join(unknown)}; known are {', '.join(ATTACKS)}.")
    options: dict[str, Any] = {"landmarks": landmarks, "boxes": boxes, "attacks": list(attacks)}
    chosen = choose_groups(groups, options)
    options |= {"eps": list(eps), "attack_images": attack_images} if attacks else {}
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
            key: short_name(value) if isinstance(value, (str, Path)) else value for key, value in options.items()
        },
        "versions": {
            "timm_csg": __version__,
            "timm": timm.__version__,
            "torch": str(torch.__version__),
            "scikit-learn": sklearn.__version__,
        },
        "checkpoints": {},
    }
    console = make_console() if console is None else console
    place = nullcontext() if output is None else folder_for_results(output)
    with place, _Bar(console, len(named), quiet=quiet) as bar:
        for label, checkpoint in named.items():
            start = time.perf_counter()
            subject = _collect(label, loaded.pop(label), seed, options, bar)
            result = _about(subject, checkpoint) | {key: None for group in chosen.values() for key in group.keys}
            for name, group in chosen.items():
                bar.stage(label, name, len(subject.seen.targets))
                result |= group.measure(subject)
            results["images"] = len(subject.seen.targets)
            results["checkpoints"][label] = result | {"seconds": round(time.perf_counter() - start, 1)}
            if output is not None:
                write_subject(subject, label, output)
                write_json(results, output / "metrics.json")
    return results


def _collect(label: str, loaded: CheckpointAndData, seed: int, options: dict[str, Any], bar: _Bar) -> Subject:
    """The one pass over the data that most metrics are computed from."""
    model, loader, class_names = loaded
    dataset: Any = getattr(loader, "dataset", None)
    bar.stage(label, "images", len(dataset) if dataset is not None else None)
    seen = measuring.collect(model, loader, progress=bar.tick)
    return Subject(model, loader, class_names, seen, seed=seed, options=options, tick=bar.tick)


def _about(subject: Subject, checkpoint: str) -> dict[str, Any]:
    """What was measured."""
    model: Any = subject.model
    config: Any = getattr(subject.model, "pretrained_cfg", {})
    mechanism = model.mechanism if is_differentiated(subject.model) else None
    return {
        "checkpoint": checkpoint,
        "architecture": config.get("architecture") or type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "filters": subject.seen.features.shape[1],
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

    def stage(self, label: str, name: str, images: int | None) -> None:
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
