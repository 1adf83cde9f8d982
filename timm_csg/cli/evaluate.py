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

import inspect
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

from timm_csg.cli.checkpoints import check_data_options, check_local, load_checkpoint_and_data, settings_of
from timm_csg.cli.results import write_json, write_tables
from timm_csg.cli.runs import RunFolder, file_stem, folder_for_results
from timm_csg.cli.settings import DATA_OPTIONS, WHERE_OPTIONS, TrainSettings
from timm_csg.cli.terminal import say
from timm_csg.manifest import folder_named
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
    output: Path | None = None,
    csv: bool = False,
    seed: int = 0,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure models on the same images; what ``timm-csg evaluate`` calls.

    Args:
        checkpoints: Folders made by ``save_pretrained``, plain timm folders, Hub repositories, timm names; the folder
            of a ``timm-csg train`` run stands for every model in it.
        groups: What is measured, as in ``timm_csg.measuring.measure``.
        output: Folder for ``metrics.json``, tables and figures; None: nothing is written.
        csv: Whether to write gate and mutual information of every class and filter, too, as CSV files into ``output``.
        seed: As in ``measure``.
        console: Where to show progress; None: nowhere.
        **options: ``landmarks``, ``boxes``, ``attacks``, ``eps``, ``attack_images``, ``explanations``, ``filters``,
            ``encoder`` as in ``measure``; and ``data``, ``data_dir``, ``val_split``, ``img_size``, ``batch_size``,
            ``device``, ... as in ``TrainSettings``, where what is left out is as in the run that a checkpoint lies in,
            or the digits.

    Returns:
        What ``metrics.json`` holds: ``data``, ``split``, ``images``, ``classes``, ``seed``, ``versions``, and under
        ``checkpoints`` the values of every model, None where a metric does not apply.

    Raises:
        ValueError: If an option is wrong, or a model has other classes than the data.
        CheckpointError, HubError: If a checkpoint cannot be loaded.
    """
    data_options = {name: options.pop(name) for name in DATA_OPTIONS if name in options}
    check_data_options(set(options) - set(inspect.signature(measure).parameters))
    chosen = choose(groups, options)
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
        "options": None,
        "versions": _VERSIONS,
        "checkpoints": {},
    }
    with nullcontext() if output is None else folder_for_results(output), _Bar(console) as bar:
        for number, (label, checkpoint) in enumerate(named.items(), 1):
            start = time.perf_counter()
            model, loader, class_names = loaded.pop(label)
            title = f"{number}/{len(named)} {label}" if len(named) > 1 else label
            stage = partial(bar.stage, title, len(loader.dataset) if hasattr(loader, "dataset") else None)
            found = measure(model, loader, groups, seed=seed, **options, progress=bar.tick, stage=stage)
            seconds = round(time.perf_counter() - start, 1)
            results["images"], results["options"] = len(found.subject.seen.targets), _options(found)
            results["checkpoints"][label] = _about(found, checkpoint) | found.numbers | {"seconds": seconds}
            if output is not None:
                write_tables(found, class_names, label, output, matrices=csv)
                write_json(results, output / "metrics.json")
    return results


def expand(checkpoints: Sequence[str]) -> dict[str, str]:
    """Short names for checkpoints; the folder of a ``timm-csg train`` run stands for all models in it.

    Args:
        checkpoints: As given.

    Returns:
        The checkpoint for each name, in order.

    Raises:
        ValueError: If none are given, one is given twice, or two would write the same files.
    """
    found: list[str] = []
    for checkpoint in checkpoints:
        run = RunFolder(folder_named(checkpoint))
        found += map(str, run.models()) if run.exists() else [checkpoint]
    parts = [_parts(path) for path in found]
    if not found:
        raise ValueError("there is nothing to evaluate; name one or more checkpoints.")
    if len(set(found)) < len(found):
        raise ValueError(f"a checkpoint is named twice: {next(name for name in found if found.count(name) > 1)}.")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    named = {"/".join(part[-length:]): checkpoint for part, checkpoint in zip(parts, found, strict=True)}
    stems: dict[str, str] = {}
    for label in named:
        if (other := stems.setdefault(file_stem(label), label)) != label:
            raise ValueError(f"the tables of {other} and {label} would have the same file names; rename one folder.")
    return named


def _parts(checkpoint: str) -> tuple[str, ...]:
    """Of its path or name, without the ``model`` at the end that all folders of runs have."""
    place = folder_named(checkpoint)
    if not place.is_dir():
        return tuple(checkpoint.split("/"))
    parts = place.absolute().parts
    return parts[:-1] if parts[-1] == "model" else parts


def settings_for(named: dict[str, str], data_options: dict[str, Any]) -> dict[str, TrainSettings]:
    """The settings of each checkpoint: its run's, with the options over them; all must name the same data.

    Raises:
        ValueError: If the checkpoints come from runs on different data, or none from a run, and no option says which
            to take.
        CheckpointError: If there is no such checkpoint, which then is the first thing to say.
    """
    runs = [run.settings() for checkpoint in named.values() if (run := RunFolder.of(checkpoint)) is not None]
    where = {tuple(getattr(run, name) for name in WHERE_OPTIONS) for run in runs}
    if "data" not in data_options:
        if len(where) > 1:
            listed = ", ".join(sorted({data for data, *_ in where}))
            raise ValueError(
                f"the checkpoints were trained on different data or parts of it ({listed}); choose with --data."
            )
        if not where:
            for checkpoint in named.values():
                check_local(checkpoint)
            likely = [name for name in named.values() if "/" in name and ":" not in name]  # not a name of timm's
            missing = [name for name in likely if not Path(name).expanduser().exists()]
            hint = f" ({missing[0]} is not a folder here, so it would be a repository of the Hub.)" if missing else ""
            raise ValueError(
                f"the checkpoints do not say what they were trained on; name the images with --data.{hint}"
            )
        known = dict(zip(WHERE_OPTIONS, next(iter(where)), strict=True))
        data_options = {name: value for name, value in known.items() if value is not None} | data_options
    return {label: settings_of(data_options, checkpoint) for label, checkpoint in named.items()}


def _options(found: Measurement) -> dict[str, Any]:
    """What was asked of a measurement, files without their folders."""
    used = {
        name: short_name(value) if isinstance(value, (str, Path)) else value
        for name, value in found.subject.options.items()
    }
    if not used["attacks"]:
        del used["eps"], used["attack_images"]
    return used


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


class _Bar(Progress):
    """Which model, which metric, how many images: a bar on a terminal, else plain lines; silent without a console."""

    def __init__(self, console: Console | None) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TimeElapsedColumn())
        live = console is not None and console.is_terminal
        super().__init__(*columns, console=console, expand=True, transient=True, disable=not live)
        self.in_lines = console is not None and not live
        self.bar = self.add_task("", total=None)

    def stage(self, model: str, images: int | None, name: str) -> None:
        """A metric begins."""
        self.reset(self.bar, total=images, description=f"{model}: {name}")
        if self.in_lines:
            say(f"measuring {model}: {name}")

    def tick(self, images: int) -> None:
        """Images are done."""
        self.advance(self.bar, images)
