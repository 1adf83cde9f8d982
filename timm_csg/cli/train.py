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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from timm_csg.cli.build import check_model, chosen_recipes, data_config
from timm_csg.cli.data import Data, load_data
from timm_csg.cli.display import LiveDisplay
from timm_csg.cli.distributed import Processes, joined
from timm_csg.cli.engine import Training
from timm_csg.cli.knobs import check_knobs
from timm_csg.cli.report import report_of_run
from timm_csg.cli.results import measure_training, write_figures, write_json, write_log
from timm_csg.cli.runs import check_folder, claimed, free_folder, prepare_folder
from timm_csg.cli.settings import STANDARD, TrainSettings
from timm_csg.cli.state import writing
from timm_csg.cli.terminal import TrainingError, UnfinishedError, make_console
from timm_csg.model import is_differentiated
from timm_csg.recipes import Recipe

_logger = logging.getLogger(__name__)


def train(
    settings: TrainSettings, output: Path, *, console: Console | None = None, quiet: bool = True
) -> dict[str, Any]:
    """Train every recipe of the settings and measure them; what ``timm-csg train`` calls.

    A run that is already in the folder is resumed: finished epochs are not repeated.

    Args:
        settings: What to do.
        output: Run folder.
        console: For progress; None: the terminal.
        quiet: No progress.

    Returns:
        The metrics by recipe, as in ``metrics.json``.

    Raises:
        ValueError: If an option, the data or the run folder is wrong.
        TrainingError: If a loss is not finite, or the disk is full; ``UnfinishedError`` if all models are trained and
            saved, but something after that failed.
    """
    given, settings = settings, settings.resolved()
    recipes = chosen_recipes(settings)
    check_knobs(given, recipes)
    console = make_console() if console is None else console
    with joined(settings.device) as processes, claimed(output) if processes.is_first else nullcontext():
        return _train(settings, recipes, output, processes, console, quiet=quiet)


def _train(
    settings: TrainSettings,
    recipes: dict[str, Recipe | None],
    output: Path,
    processes: Processes,
    console: Console,
    *,
    quiet: bool,
) -> dict[str, Any]:
    if processes.is_first:
        check_folder(settings, output)
    data = load_data(settings, data_config(settings), processes)
    settings = settings.with_epochs(len(data.train))
    for recipe in recipes.values():
        check_model(settings, data.num_classes, recipe)
    if processes.is_first:
        prepare_folder(settings, output)
    device, steps_per_epoch = processes.device, len(data.train)
    finished = _Finished(output, data)
    log: list[dict[str, Any]] = []
    with LiveDisplay(console, list(recipes), len(recipes) * settings.epochs * steps_per_epoch, quiet=quiet) as display:
        shared = f", {processes.count} processes" if processes.count > 1 else ""
        display.say(f"run folder: {output}")
        display.say(
            f"{data.description}; {settings.model}, {settings.epochs} epoch{'s' * (settings.epochs > 1)} each{shared}"
        )
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
                    _save_unfinished(training, output, data)
                raise
            log += training.history
            if processes.is_first:
                display.note(f"measuring {name}")
                finished.add(training, log)
            processes.wait_for_first(f"measured {name}")
        if processes.is_first:
            display.note("writing the report")
            finished.report(settings, device)
        processes.wait_for_first("wrote the report")
    return finished.results()


class _Finished:
    """Trainings that have ended: the model is saved first; whatever fails after that takes nothing else with it."""

    def __init__(self, output: Path, data: Data) -> None:
        self.output, self.data = output, data
        self.measured: dict[str, Any] = {}
        self.failures: list[str] = []

    def add(self, training: Training, log: list[dict[str, Any]]) -> None:
        """Save, measure and draw one."""
        output, name = self.output, training.name
        with writing(output):
            write_log(log, output / "log.csv")
            save_models(training, output, self.data)
        with self._guarded(f"{name} could not be measured; try again: timm-csg train --resume {output}"):
            standard = self.measured.get(STANDARD, {}).get("accuracy")
            found = measure_training(training, self.data, standard)
            with writing(output):
                self.measured[name] = found.numbers
                write_json(self.measured, output / "metrics.json")
            with self._guarded(f"the figures of {name} could not be drawn"):
                title = f"{name} ({found.numbers['model']}, {found.numbers['data']})"
                write_figures(found, self.data.class_names, name, title, output / "figures")
            with writing(output):
                save_models(training, output, self.data, found.numbers)

    def report(self, settings: TrainSettings, device: torch.device) -> None:
        """The report of the run."""
        with self._guarded(f"the report could not be written; try again: timm-csg report {self.output}"):
            report_of_run(self.output, settings, self.data, device)

    @contextmanager
    def _guarded(self, failure: str) -> Iterator[None]:
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:  # the model is on disk; that, and the other recipes, must not be lost to a picture
            _logger.debug("%s", failure, exc_info=True)
            self.failures.append(f"{failure} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})")

    def results(self) -> dict[str, Any]:
        """The metrics by recipe.

        Raises:
            UnfinishedError: If something failed after a model was saved.
        """
        if self.failures:
            raise UnfinishedError(
                f"the models are saved in {self.output}, but {'; '.join(self.failures)}.", self.measured
            )
        return self.measured


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


def _save_unfinished(training: Training, output: Path, data: Data) -> None:
    """The models of an interrupted training, usable as they are; the state to resume from is on disk already."""
    try:
        save_models(training, output, data)
    except (ValueError, OSError) as error:
        _logger.warning("the interrupted model is not saved: %s", error)


def save_models(training: Training, output: Path, data: Data, measured: dict[str, Any] | None = None) -> None:
    """The recipe's model, and the run's own ``model/``: that of its last differentiated recipe."""
    figure = output / "figures" / f"gate_{training.name}.png"
    about: dict[str, Any] = {"class_names": data.class_names, "preprocessing": data.preprocessing}
    training.save_model(output / training.name / "model", measured, figure, **about)
    if is_differentiated(training.eval_model):
        training.save_model(output / "model", measured, figure, **about)


def default_output(settings: TrainSettings) -> Path:
    """A new folder named after data and model, with a number."""
    resolved = settings.resolved()
    return free_folder(resolved.data_name, str(resolved.model))
