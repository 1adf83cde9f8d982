"""``timm-csg train``: one or several recipes on one data set, side by side, into one run folder.

::

    run/
      settings.json            what was asked for; --resume reads it
      model/                   the last recipe's model, for timm_csg.from_pretrained and for plain timm
      metrics.json  log.csv    all recipes
      figures/*.png            gates and mutual information
      report.html              what the last gated recipe's filters look at, beside the standard model
      <recipe>/                state.pt for --resume, and the recipe's own model/
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_csg.checkpoint import replacing
from timm_csg.cli.build import data_config, with_overrides
from timm_csg.cli.data import Data, load_data
from timm_csg.cli.display import LiveDisplay
from timm_csg.cli.distributed import Processes, joined, told_by_first
from timm_csg.cli.engine import Training
from timm_csg.cli.report import report_of_run
from timm_csg.cli.results import free_folder, measure, write_json, write_log
from timm_csg.cli.settings import STANDARD, TrainSettings
from timm_csg.cli.state import STATE, writing
from timm_csg.model import is_differentiated
from timm_csg.recipes import RECIPES

_logger = logging.getLogger(__name__)
_SETTINGS = "settings.json"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as ``replacing`` names them


def train(
    settings: TrainSettings, output: Path, *, console: Console | None = None, quiet: bool = True
) -> dict[str, Any]:
    """Train every recipe of the settings and measure them; what ``timm-csg train`` calls.

    A folder that already holds this run is gone on with: finished epochs are not repeated.

    Args:
        settings: What to do.
        output: Run folder.
        console: For progress; None: the terminal.
        quiet: No progress.

    Returns:
        The metrics by recipe, as in ``metrics.json``.

    Raises:
        ValueError: If an option, the data or the run folder is wrong.
        TrainingError: If a loss is not finite, or the disk is full.
    """
    settings = settings.resolved()
    with joined(settings.device) as processes:
        return _train(settings, output, processes, Console() if console is None else console, quiet=quiet)


def _train(
    settings: TrainSettings, output: Path, processes: Processes, console: Console, *, quiet: bool
) -> dict[str, Any]:
    recipes = {name: None if name == STANDARD else with_overrides(RECIPES[name], settings) for name in settings.recipe}
    if processes.is_first:
        _check_folder(settings, output)
    data = load_data(settings, data_config(settings), processes)
    settings = settings.with_epochs(len(data.train))
    if processes.is_first:
        _prepare_folder(settings, output)
    device, steps_per_epoch = processes.device, len(data.train)
    results: dict[str, Any] = {}
    log: list[dict[str, Any]] = []
    if not quiet:
        shared = f", {processes.count} processes" if processes.count > 1 else ""
        console.print(f"{data.description}; {settings.model}, {settings.epochs} epochs each{shared}", highlight=False)
    with LiveDisplay(console, list(recipes), len(recipes) * settings.epochs * steps_per_epoch, quiet=quiet) as display:
        for name, recipe in recipes.items():
            training = Training(
                name, recipe, settings, data.num_classes, steps_per_epoch, device, output / name, processes
            )
            display.start(name, settings.epochs, training.history, steps_per_epoch)
            try:
                training.assign(data.own_plain_train)
                training.run(data.train, data.own_validation, _Logged(display, log, training, output))
            except KeyboardInterrupt:
                if processes.count == 1:  # of several, some may be in the middle of a step that the others wait for
                    _save_models(training, output, data, None)
                raise
            log += training.history
            if processes.is_first:
                display.note(f"measuring {name}")
                with writing(output):
                    write_log(log, output / "log.csv")
                    results[name] = measure(training, data, output / "figures")
                    _save_models(training, output, data, results[name])
                    write_json(results, output / "metrics.json")
            processes.wait_for_first(f"measured {name}")
        if processes.is_first:
            display.note("writing the report")
            with writing(output):
                report_of_run(output, settings, data, device)
        processes.wait_for_first("wrote the report")
    return results


class _Logged:
    """Passes on to the display, and rewrites log.csv after every epoch."""

    def __init__(self, display: LiveDisplay, finished: list[dict[str, Any]], training: Training, output: Path) -> None:
        self.display, self.finished, self.training, self.output = display, finished, training, output

    def batch(self, path: str) -> None:
        self.display.batch(path)

    def epoch(self, row: dict[str, Any]) -> None:
        with writing(self.output):
            write_log([*self.finished, *self.training.history], self.output / "log.csv")
        self.display.epoch(row)


def _save_models(training: Training, output: Path, data: Data, measured: dict[str, Any] | None) -> None:
    """The recipe's model, and the run's own ``model/``: that of its last differentiated recipe."""
    figure = output / "figures" / f"gate_{training.name}.png"
    about: dict[str, Any] = {"class_names": data.class_names, "preprocessing": data.preprocessing}
    training.save_model(output / training.name / "model", measured, figure, **about)
    if is_differentiated(training.eval_model):
        training.save_model(output / "model", measured, figure, **about)


def read_settings(output: Path) -> TrainSettings:
    """The settings of an earlier run in this folder, for ``--resume``.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = output / _SETTINGS

    def read() -> str:
        if not path.is_file():
            raise ValueError(f"nothing to resume: {path} does not exist; --resume takes the folder of an earlier run.")
        return path.read_text(encoding="utf-8")

    return TrainSettings.from_json(told_by_first("settings", read))


def _check_folder(settings: TrainSettings, output: Path) -> None:
    """Refuse a folder with epochs of a run that had other settings; another machine's device and paths may differ."""
    if not any(output.glob(f"*/{STATE}")):
        return
    machine = {name: getattr(settings, name) for name in ("device", "workers", "data_dir")}
    earlier = replace(read_settings(output), **machine)
    if earlier != replace(settings, epochs=settings.epochs or earlier.epochs):
        raise ValueError(f"{output} holds a run with other settings; choose another --output, or --resume {output}.")


def _prepare_folder(settings: TrainSettings, output: Path) -> None:
    """Make the run folder, or clear away what a killed process was writing."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in output.rglob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        with replacing(output / _SETTINGS) as temporary:
            temporary.write_text(settings.to_json(), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to the run folder {output}: {error}; choose another --output.") from error


def default_output(settings: TrainSettings) -> Path:
    """A folder name that is free: data, model and a number."""
    resolved = settings.resolved()
    return free_folder(str(resolved.data), str(resolved.model))
