"""``timm-csg report``: a trained model and images to one HTML file; and the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from timm_csg import plots
from timm_csg.cli.checkpoint_data import (
    check_data_options,
    checkpoint_folder,
    import_plugins,
    input_config,
    load_checkpoint_and_data,
    load_model,
    settings_of,
)
from timm_csg.cli.data import Data
from timm_csg.cli.runs import writable_file
from timm_csg.cli.settings import REPORT, STANDARD, TrainSettings
from timm_csg.cli.terminal import make_console, say
from timm_csg.manifest import CONFIG


def report(
    checkpoint: str,
    *,
    reference: str | None = None,
    output: str | Path = REPORT,
    title: str | None = None,
    plugins: Sequence[str] = (),
    console: Console | None = None,
    quiet: bool = True,
    **data_options: Any,
) -> Path:
    """Write the report of a checkpoint; what ``timm-csg report`` calls.

    Args:
        checkpoint: Folder made by ``save_pretrained``, plain timm folder, folder of a ``timm-csg train`` run, Hub
            repository, or timm name.
        reference: A checkpoint to compare with; None: the standard model of the run, if there is one.
        output: The file.
        title: Of the report; None: from the model's name.
        plugins: Python files or modules to import first, for example one that registers a model.
        console: For progress; None: the terminal.
        quiet: No progress.
        **data_options: ``data``, ``data_dir``, ``val_split``, ``img_size``, ``batch_size``, ``device``, ... as in
            ``TrainSettings``; left out: those of the run that the checkpoint lies in, or the digits.

    Returns:
        The file.

    Raises:
        ValueError: If an option is wrong, or a model has other classes or wants other images than the data.
        CheckpointError, HubError: If a checkpoint cannot be loaded.
    """
    check_data_options(data_options)
    import_plugins(plugins)
    output = Path(output).expanduser()
    writable_file(output)
    settings = settings_of(data_options, checkpoint)
    model, loader, class_names = load_checkpoint_and_data(checkpoint, settings)
    reference = _standard_beside(checkpoint) if reference is None else reference
    other = None
    if reference is not None:
        other = load_model(reference, next(model.parameters()).device)
        ours, theirs = input_config(model, settings), input_config(other, settings)
        differing = [name for name in ("input_size", "mean", "std") if tuple(ours[name]) != tuple(theirs[name])]
        if differing:
            raise ValueError(
                f"{reference} wants images with another {' and '.join(differing)} than {checkpoint}, so the two cannot "
                "be compared on the same images."
            )
    console = make_console() if console is None else console
    with _status(console, f"looking at {checkpoint}", quiet=quiet):
        return plots.report(model, loader, output, class_names=class_names, reference=other, title=title)


def report_of_run(run: Path, settings: TrainSettings, data: Data, device: torch.device) -> Path | None:
    """The report of a ``timm-csg train`` run, into its folder: of its last gated model, beside the standard one.

    Args:
        run: The folder, with its models.
        settings: Of the run.
        data: Its images.
        device: Where to run the models.

    Returns:
        The file; None if the run has no model.
    """
    standard = run / STANDARD / "model"
    model = run / "model" if (run / "model" / CONFIG).is_file() else standard
    if not (model / CONFIG).is_file():
        return None
    other = load_model(str(standard), device) if model != standard and (standard / CONFIG).is_file() else None
    return plots.report(
        load_model(str(model), device),
        data.validation,
        run / REPORT,
        class_names=data.class_names,
        reference=other,
        title=f"What {Path(settings.model).name} has learned of {settings.data_name}",
    )


def _standard_beside(checkpoint: str) -> str | None:
    """The standard model of the run that a checkpoint lies in, unless it is that one."""
    folder = checkpoint_folder(checkpoint)
    if folder is None:
        return None
    for candidate in (folder.resolve().parent, folder.resolve().parent.parent):
        standard = candidate / STANDARD / "model"
        if (standard / CONFIG).is_file() and standard != folder.resolve():
            return str(standard)
    return None


def _status(console: Console, text: str, *, quiet: bool) -> AbstractContextManager[object]:
    """What is going on: a line that moves on a terminal, else a plain one."""
    if console.is_terminal and not quiet:
        return console.status(Text(text), spinner="line")
    if not quiet:
        say(text)
    return nullcontext()
