"""``timm-csg train``: one or several recipes on one data set, side by side, into one ``RunFolder``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_csg.cli.build import check_knobs, check_model, chosen_recipes, data_config
from timm_csg.cli.data import Data, load_data
from timm_csg.cli.display import LiveDisplay
from timm_csg.cli.distributed import Processes, joined
from timm_csg.cli.engine import Training
from timm_csg.cli.frozen import without_frozen_layers
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
    folder = RunFolder(output)
    with joined(settings.device) as processes, folder.claimed() if processes.is_first else nullcontext():
        tool = EpochLog(settings.log if processes.is_first else None, folder.path, asdict(settings))
        data, settings = _prepare(settings, recipes, folder, processes)
        steps = len(recipes) * settings.epochs * len(data.train)
        with LiveDisplay(console, list(recipes), steps) as display, tool:
            run = _Run(folder, settings, data, processes, display, tool)
            for name, recipe in recipes.items():
                run.train(name, recipe)
            run.report()
    return run.results()  # of what failed only the first process knows; none waits for it any more


def _prepare(
    settings: TrainSettings, recipes: dict[str, Recipe | None], folder: RunFolder, processes: Processes
) -> tuple[Data, TrainSettings]:
    """The data, and the settings with what it decides; nothing is written before all of it is known to work."""
    if processes.is_first:
        folder.check(settings)
    data = load_data(settings, data_config(settings), processes)
    settings = settings.with_epochs(len(data.train))
    for recipe in recipes.values():
        check_model(settings, data.num_classes, recipe)
    if processes.is_first:
        folder.prepare(settings)
    return data, settings


class _Run:
    """The trainings of a run, one after another; each model is saved first, so that no later failure loses it."""

    def __init__(
        self,
        folder: RunFolder,
        settings: TrainSettings,
        data: Data,
        processes: Processes,
        display: LiveDisplay,
        tool: EpochLog,
    ) -> None:
        self.folder, self.settings, self.data, self.processes = folder, settings, data, processes
        self.display, self.tool = display, tool
        self.log: list[dict[str, Any]] = []
        self.measured: dict[str, Any] = {}
        self.failures: list[str] = []
        shared = f", {processes.count} processes" if processes.count > 1 else ""
        epochs = f"{settings.epochs} epoch{'s' * (settings.epochs > 1)} each"
        display.say(f"run folder: {folder}")
        display.say(f"{data.description}; {settings.model_name}, {epochs}{shared}")
        if settings.recipe != [STANDARD]:
            display.say("gated accuracy: where each class may use its own filters only")

    def train(self, name: str, recipe: Recipe | None) -> None:
        """Train a recipe, or what is left of its epochs; then save and measure the model."""
        data, steps = self.data, len(self.data.train)
        training = Training(
            name, recipe, self.settings, data.num_classes, steps, self.folder.state_of(name), self.processes
        )
        self.display.begin(name, self.settings.epochs, training.history, steps)
        try:
            training.assign(data.own_plain_train)
            batches = without_frozen_layers(training, data.train, self.display)
            training.run(batches, data.own_validation, self.display.batch, partial(self._epoch, training))
        except KeyboardInterrupt:
            if self.processes.count == 1:  # of several, some may be in the middle of a step that the others wait for
                self._save_interrupted(training)
            raise
        if self.processes.is_first:
            self.display.note(f"measuring {name}")
            self._finish(training)
        self.processes.wait_for_first(f"measured {name}")

    def _epoch(self, training: Training, row: dict[str, Any]) -> None:
        """An epoch is done and its state on disk."""
        with writing(self.folder.path):
            write_log([*self.log, *training.history], self.folder.log)
        self.tool.epoch(row)
        self.display.epoch(row)

    def _finish(self, training: Training) -> None:
        """Save, measure and draw."""
        folder, name = self.folder, training.name
        self.log += training.history
        with writing(folder.path):
            write_log(self.log, folder.log)
            self._save(training)
        with self._guarded(f"{name} could not be measured; try again: timm-csg train --resume {folder}"):
            standard = self.measured.get(STANDARD, {}).get("accuracy")
            found = measure_training(training, self.data, standard)
            with writing(folder.path):
                self.measured[name] = found.numbers
                write_json(self.measured, folder.metrics)
            with self._guarded(f"the figures of {name} could not be drawn"):
                title = f"{name} ({found.numbers['model']}, {found.numbers['data']})"
                write_figures(found, self.data.class_names, name, title, folder.figures)
            with writing(folder.path):
                self._save(training, found.numbers)

    def _save(self, training: Training, measured: dict[str, Any] | None = None) -> None:
        """The recipe's model, and the run's own: that of its last differentiated recipe."""
        about: dict[str, Any] = {"class_names": self.data.class_names, "preprocessing": self.data.preprocessing}
        places = [self.folder.model_of(training.name), self.folder.model]
        for place in places if is_differentiated(training.eval_model) else places[:1]:
            training.save_model(place, measured, self.folder.gate_figure(training.name), **about)

    def _save_interrupted(self, training: Training) -> None:
        """The models of an interrupted training, usable as they are; the state to resume from is on disk already."""
        try:
            self._save(training)
        except (ValueError, OSError) as error:
            _logger.warning("the interrupted model is not saved: %s", error)

    def report(self) -> None:
        """Write the report of the run."""
        if self.processes.is_first:
            self.display.note("writing the report")
            with self._guarded(f"the report could not be written; try again: timm-csg report {self.folder}"):
                report_of_run(self.folder, self.settings, self.data, self.processes.device)
        self.processes.wait_for_first("wrote the report")

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
            failed = "; ".join(self.failures)
            raise UnfinishedError(f"the models are saved in {self.folder}, but {failed}.", self.measured)
        return self.measured


def default_output(settings: TrainSettings) -> Path:
    """A new folder named after data and model, with a number."""
    resolved = settings.resolved()
    return free_folder(resolved.data_name, resolved.model_name)
