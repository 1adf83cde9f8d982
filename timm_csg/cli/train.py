"""``timm-csg train``: one or several recipes on one data set, side by side, into one run folder.

::

    run/
      settings.json            what was asked for; --resume reads it
      model/                   the last recipe's model, for timm_csg.from_pretrained and for plain timm
      metrics.json  log.csv    all recipes
      figures/*.png            gates and mutual information
      <recipe>/                state.safetensors for --resume, and the recipe's own model/
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from timm_csg.checkpoint import replacing
from timm_csg.cli.build import data_config, with_overrides
from timm_csg.cli.data import load_data
from timm_csg.cli.display import LiveDisplay
from timm_csg.cli.engine import Training
from timm_csg.cli.results import measure, write_json, write_log
from timm_csg.cli.settings import STANDARD, TrainSettings
from timm_csg.model import is_differentiated
from timm_csg.recipes import RECIPES

_logger = logging.getLogger(__name__)
_SETTINGS = "settings.json"


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
        ValueError: If an option or the data is wrong.
        TrainingError: If a loss is not finite.
    """
    settings = settings.resolved()
    recipes = {name: None if name == STANDARD else with_overrides(RECIPES[name], settings) for name in settings.recipe}
    _check_folder(settings, output)
    device = _device(settings.device)
    data = load_data(settings, data_config(settings), device)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / _SETTINGS) as temporary:
        temporary.write_text(settings.to_json(), encoding="utf-8")
    steps_per_epoch = len(data.train)
    results: dict[str, Any] = {}
    log: list[dict[str, Any]] = []
    console = Console() if console is None else console
    if not quiet:
        console.print(f"{data.description}; {settings.model}, {settings.epochs} epochs each", highlight=False)
    with LiveDisplay(console, list(recipes), len(recipes) * settings.epochs * steps_per_epoch, quiet=quiet) as display:
        for name, recipe in recipes.items():
            training = Training(name, recipe, settings, data.num_classes, steps_per_epoch, device, output / name)
            display.start(name, settings.epochs, training.history, steps_per_epoch)
            try:
                training.run(data.train, data.validation, _Logged(display, log, training, output))
            except KeyboardInterrupt:
                _save_models(training, output, None)
                raise
            log += training.history
            write_log(log, output / "log.csv")
            display.note(f"measuring {name}")
            results[name] = measure(training, data, output / "figures")
            _save_models(training, output, results[name])
            write_json(results, output / "metrics.json")
    return results


class _Logged:
    """Passes on to the display, and rewrites log.csv after every epoch."""

    def __init__(self, display: LiveDisplay, finished: list[dict[str, Any]], training: Training, output: Path) -> None:
        self.display, self.finished, self.training, self.output = display, finished, training, output

    def batch(self, path: str) -> None:
        self.display.batch(path)

    def epoch(self, row: dict[str, Any]) -> None:
        write_log([*self.finished, *self.training.history], self.output / "log.csv")
        self.display.epoch(row)


def _save_models(training: Training, output: Path, measured: dict[str, Any] | None) -> None:
    """The recipe's model, and the run's own ``model/``: that of its last differentiated recipe."""
    figure = output / "figures" / f"gate_{training.name}.png"
    training.save_model(output / training.name / "model", measured, figure)
    if is_differentiated(training.eval_model):
        training.save_model(output / "model", measured, figure)


def read_settings(output: Path) -> TrainSettings:
    """The settings of an earlier run in this folder, for ``--resume``.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = output / _SETTINGS
    if not path.is_file():
        raise ValueError(f"nothing to resume: {path} does not exist; --resume takes the folder of an earlier run.")
    return TrainSettings.from_json(path.read_text(encoding="utf-8"))


def _check_folder(settings: TrainSettings, output: Path) -> None:
    """Refuse a folder with epochs of a run that had other settings; another machine's device and paths may differ."""
    if not any(output.glob("*/state.safetensors")):
        return
    machine = {name: getattr(settings, name) for name in ("device", "workers", "data_dir")}
    if replace(read_settings(output), **machine) != settings:
        raise ValueError(f"{output} holds a run with other settings; choose another --output, or --resume {output}.")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {error}") from error
    return device


def default_output(settings: TrainSettings, folder: Path = Path("runs")) -> Path:
    """A folder name that is free: data, model and a number."""
    resolved = settings.resolved()
    stem = "-".join(str(part).replace("/", "_").replace(":", "_") for part in (resolved.data, resolved.model))
    number = 1
    while (folder / f"{stem}-{number}").exists():
        number += 1
    return folder / f"{stem}-{number}"
