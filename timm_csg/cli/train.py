"""``timm-csg train``: one or several recipes on one data set, side by side, into one ``RunFolder``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from timm_csg.cli.build import check_knobs, check_model, chosen_recipes, data_config
from timm_csg.cli.data import Data, load_data
from timm_csg.cli.display import LiveDisplay
from timm_csg.cli.distributed import Processes, joined
from timm_csg.cli.engine import Training
from timm_csg.cli.logs import EpochLog
from timm_csg.cli.report import report_of_run
from timm_csg.cli.results import measure_training, write_figures, write_json, write_log
from timm_csg.cli.runs import RunFolder, free_folder
from timm_csg.cli.settings import STANDARD, TrainSettings
from timm_csg.cli.state import writing
from timm_csg.cli.terminal import TrainingError, UnfinishedError
from timm_csg.model import is_differentiated
from timm_csg.recipes import Recipe

_logger = logging.getLogger(__name__)


def train(settings: TrainSettings, output: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Train every recipe of the settings and measure them; what ``timm-csg train`` calls.

    A run that is already in the folder is resumed: finished epochs are not repeated.

    Args:
        settings: What to do.
        output: Run folder.
        console: Where to show progress; None: nowhere.

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
    run = RunFolder(output)
    with joined(settings.device) as processes, run.claimed() if processes.is_first else nullcontext():
        return _train(settings, recipes, run, processes, console)


def _train(
    settings: TrainSettings,
    recipes: dict[str, Recipe | None],
    run: RunFolder,
    processes: Processes,
    console: Console | None,
) -> dict[str, Any]:
    tool = EpochLog(settings.log if processes.is_first else None, run.path, asdict(settings))
    if processes.is_first:
        run.check(settings)
    data = load_data(settings, data_config(settings), processes)
    settings = settings.with_epochs(len(data.train))
    for recipe in recipes.values():
        check_model(settings, data.num_classes, recipe)
    if processes.is_first:
        run.prepare(settings)
    steps_per_epoch = len(data.train)
    finished = _Finished(run, data)
    steps = len(recipes) * settings.epochs * steps_per_epoch
    with LiveDisplay(console, list(recipes), steps) as display, tool:
        shared = f", {processes.count} processes" if processes.count > 1 else ""
        epochs = f"{settings.epochs} epoch{'s' * (settings.epochs > 1)} each"
        display.say(f"run folder: {run}")
        display.say(f"{data.description}; {settings.model}, {epochs}{shared}")
        for name, recipe in recipes.items():
            training = Training(
                name, recipe, settings, data.num_classes, steps_per_epoch, run.state_of(name), processes
            )
            display.start(name, settings.epochs, training.history, steps_per_epoch)
            try:
                training.assign(data.own_plain_train)
                training.run(data.train, data.own_validation, _Logged(display, finished, training, tool))
            except KeyboardInterrupt:
                if processes.count == 1:  # of several, some may be in the middle of a step that the others wait for
                    finished.save_interrupted(training)
                raise
            if processes.is_first:
                display.note(f"measuring {name}")
                finished.add(training)
            processes.wait_for_first(f"measured {name}")
        if processes.is_first:
            display.note("writing the report")
            finished.report(settings, processes.device)
        processes.wait_for_first("wrote the report")
    return finished.results()


class _Finished:
    """Trainings that have ended: the model is saved first, so that no later failure loses it."""

    def __init__(self, run: RunFolder, data: Data) -> None:
        self.run, self.data = run, data
        self.log: list[dict[str, Any]] = []
        self.measured: dict[str, Any] = {}
        self.failures: list[str] = []

    def add(self, training: Training) -> None:
        """Save, measure and draw one."""
        run, name = self.run, training.name
        self.log += training.history
        with writing(run.path):
            write_log(self.log, run.log)
            self._save(training)
        with self._guarded(f"{name} could not be measured; try again: timm-csg train --resume {run}"):
            standard = self.measured.get(STANDARD, {}).get("accuracy")
            found = measure_training(training, self.data, standard)
            with writing(run.path):
                self.measured[name] = found.numbers
                write_json(self.measured, run.metrics)
            with self._guarded(f"the figures of {name} could not be drawn"):
                title = f"{name} ({found.numbers['model']}, {found.numbers['data']})"
                write_figures(found, self.data.class_names, name, title, run.figures)
            with writing(run.path):
                self._save(training, found.numbers)

    def _save(self, training: Training, measured: dict[str, Any] | None = None) -> None:
        """The recipe's model, and the run's own: that of its last differentiated recipe."""
        about: dict[str, Any] = {"class_names": self.data.class_names, "preprocessing": self.data.preprocessing}
        folders = [self.run.model_of(training.name), self.run.model]
        for folder in folders if is_differentiated(training.eval_model) else folders[:1]:
            training.save_model(folder, measured, self.run.gate_figure(training.name), **about)

    def save_interrupted(self, training: Training) -> None:
        """The models of an interrupted training, usable as they are; the state to resume from is on disk already."""
        try:
            self._save(training)
        except (ValueError, OSError) as error:
            _logger.warning("the interrupted model is not saved: %s", error)

    def report(self, settings: TrainSettings, device: torch.device) -> None:
        """The report of the run."""
        with self._guarded(f"the report could not be written; try again: timm-csg report {self.run}"):
            report_of_run(self.run, settings, self.data, device)

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
            raise UnfinishedError(f"the models are saved in {self.run}, but {'; '.join(self.failures)}.", self.measured)
        return self.measured


class _Logged:
    """Passes on to the display and to the tool of ``--log``, and rewrites log.csv after every epoch."""

    def __init__(self, display: LiveDisplay, finished: _Finished, training: Training, tool: EpochLog) -> None:
        self.batch, self.display, self.finished, self.training = display.batch, display, finished, training
        self.tool = tool

    def epoch(self, row: dict[str, Any]) -> None:
        run = self.finished.run
        with writing(run.path):
            write_log([*self.finished.log, *self.training.history], run.log)
        self.tool.epoch(row)
        self.display.epoch(row)


def default_output(settings: TrainSettings) -> Path:
    """A new folder named after data and model, with a number."""
    resolved = settings.resolved()
    return free_folder(resolved.data_name, str(resolved.model))
