"""``timm-csg report``: a trained model and images to one HTML file; the report of a run; where a report comes from."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from timm_csg import plots
from timm_csg.cli.checkpoints import (
    check_data_options,
    checkpoint_folder,
    load_checkpoint_and_data,
    load_model,
    settings_of,
)
from timm_csg.cli.data import Data
from timm_csg.cli.preprocessing import model_input_config
from timm_csg.cli.runs import RunFolder, writable_file
from timm_csg.cli.settings import STANDARD, TrainSettings
from timm_csg.cli.terminal import say
from timm_csg.manifest import CONFIG, WEIGHTS, sha256


def report(
    checkpoint: str,
    *,
    reference: str | None = None,
    output: str | Path = "report.html",
    title: str | None = None,
    console: Console | None = None,
    **data_options: Any,
) -> Path:
    """Write the report of a checkpoint; what ``timm-csg report`` calls.

    Args:
        checkpoint: Folder made by ``save_pretrained``, plain timm folder, folder of a ``timm-csg train`` run, Hub
            repository, or timm name.
        reference: A checkpoint to compare with; None: the standard model of the run, if there is one.
        output: The file.
        title: Of the report; None: from the model's name.
        console: Where to show progress; None: nowhere.
        **data_options: ``data``, ``data_dir``, ``val_split``, ``img_size``, ``batch_size``, ``device``, ... as in
            ``TrainSettings``; left out: those of the run that the checkpoint lies in, or the digits.

    Returns:
        The file.

    Raises:
        ValueError: If an option is wrong, or a model has other classes or expects other images than the data.
        CheckpointError, HubError: If a checkpoint cannot be loaded.
    """
    check_data_options(data_options)
    output = Path(output).expanduser()
    writable_file(output)
    settings = settings_of(data_options, checkpoint)
    model, loader, class_names = load_checkpoint_and_data(checkpoint, settings)
    folder, run = checkpoint_folder(checkpoint), RunFolder.of(checkpoint)
    beside = run.standard_beside(folder) if run is not None and folder is not None else None
    other, reference = None, reference or (None if beside is None else str(beside))
    if reference is not None:
        other = load_model(reference, next(model.parameters()).device)
        ours, theirs = model_input_config(model, settings), model_input_config(other, settings)
        differing = [name for name in ("input_size", "mean", "std") if tuple(ours[name]) != tuple(theirs[name])]
        if differing:
            raise ValueError(
                f"{reference} expects images with another {' and '.join(differing)} than {checkpoint}, so the two "
                "cannot be compared on the same images."
            )
    text = f"looking at {checkpoint}"
    if console is not None and not console.is_terminal:
        say(text)
    with nullcontext() if console is None else console.status(Text(text), spinner="line"):
        seed = None if run is None else run.settings().seed
        about = provenance(folder, seed=seed, data=f"{settings.data_name}, split {settings.val_split}")
        return plots.report(model, loader, output, class_names=class_names, reference=other, title=title, about=about)


def report_of_run(run: RunFolder, settings: TrainSettings, data: Data, device: torch.device) -> Path | None:
    """The report of a ``timm-csg train`` run, into its folder: of its last gated model, beside the standard one.

    Args:
        run: The folder, with its models.
        settings: Of the run.
        data: Its images.
        device: Where to run the models.

    Returns:
        The file; None if the run has no model.
    """
    model = run.model if (run.model / CONFIG).is_file() else run.model_of(STANDARD)
    if not (model / CONFIG).is_file():
        return None
    standard = run.standard_beside(model)
    return plots.report(
        load_model(model, device),
        data.validation,
        run.report,
        class_names=data.class_names,
        reference=None if standard is None else load_model(standard, device),
        title=f"What {settings.model_name} has learned of {settings.data_name}",
        about=provenance(model, seed=settings.seed, data=data.description),
    )


def provenance(
    folder: Path | None, *, seed: int | None = None, data: str | None = None, now: datetime | None = None
) -> dict[str, str]:
    """Rows for the page about a report.

    Args:
        folder: Of the checkpoint; None: it lies in none.
        seed: Of the training; None: not known.
        data: The data and its counts, in words.
        now: The date; None: now.

    Returns:
        Text by heading; what is not known is left out.
    """
    rows = {"Date": (now or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M %Z").strip()}
    weights = None if folder is None else folder / WEIGHTS
    if weights is not None and weights.is_file():
        rows["Weights"] = f"{WEIGHTS}, SHA-256 {sha256(weights)}"
    if data is not None:
        rows["Data"] = data
    if seed is not None:
        rows["Seed of the training"] = str(seed)
    command = command_in_words(sys.argv)
    if command is not None:
        rows["Command"] = command
    return rows


def command_in_words(arguments: Sequence[str]) -> str | None:
    """The command that is running, its paths without the folders above them; None if it is another program's.

    Example:
        >>> command_in_words(["/usr/bin/timm-csg", "report", "/home/me/run", "--data", "folder:/data/my photos"])
        "timm-csg report run --data 'folder:my photos'"
        >>> command_in_words(["/usr/bin/pytest"]) is None
        True
    """
    program = Path(arguments[0]) if arguments else Path()
    if program.stem != "timm-csg" and program.parts[-2:] != ("timm_csg", "__main__.py"):
        return None
    return shlex.join(["timm-csg", *map(_without_folders, arguments[1:])])


def _without_folders(argument: str) -> str:
    head, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    kind, colon, path = value.partition(":")
    if colon and kind in ("folder", "local-dir"):
        return f"{head}{sign}{kind}:{Path(path).name or path}"
    is_path = value.startswith(("/", ".", "~", "\\")) or Path(value).is_absolute()
    return f"{head}{sign}{Path(value).name or value}" if is_path else argument
