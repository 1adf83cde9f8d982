"""``--log``: the numbers of every epoch for a tool that draws them, through the tool's own package."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)
Log = Callable[[Mapping[str, float], int], None]
Close = Callable[[], None]


class EpochLog:
    """Passes the numbers of every epoch on; one run of the tool for each training, so that it draws them together.

    ``log.csv`` is written in any case, so ``"csv"`` adds nothing. A context manager; leaving it closes what is open.

    Args:
        kind: ``"tensorboard"``, ``"wandb"``, ``"csv"`` or None.
        folder: The run folder: TensorBoard's files go into ``folder/tensorboard/<recipe>``, wandb's into its own.
        config: The settings of the run, for wandb.

    Raises:
        ImportError: If the tool's package is missing; the message says how to install it.
    """

    def __init__(self, kind: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self._begin = None if kind in (None, "csv") else {"tensorboard": _tensorboard, "wandb": _wandb}[kind]
        if self._begin is not None:
            _check_installed(kind)
        self._recipe: str | None = None
        self._log: Log = _nothing
        self._close: Close = _nothing

    def __enter__(self) -> EpochLog:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._close()
        except Exception as problem:  # as in epoch(); an error of the training goes on its way
            _logger.warning("--log could not be closed (%s: %s)", type(problem).__name__, problem)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Log a line of ``log.csv``: its numbers, at its epoch, counted from 1 as the tools do."""
        if self._begin is None:
            return
        try:
            if row["recipe"] != self._recipe:
                self._close()
                self._recipe = row["recipe"]
                self._log, self._close = self._begin(self.folder, row["recipe"], self.config)
            numbers = {
                name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "epoch"
            }
            self._log(numbers, row["epoch"] + 1)
        except Exception as error:  # of the tool: network, disk, account; the training must not be lost to it
            _logger.warning("--log no longer works (%s: %s); log.csv goes on", type(error).__name__, error)
            self._begin, self._close = None, _nothing


def _nothing(*_: object) -> None:
    """There is nothing to log to or to close."""


def _tensorboard(folder: Path, recipe: str, config: Mapping[str, Any]) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard" / recipe))

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path, recipe: str, config: Mapping[str, Any]) -> tuple[Log, Close]:
    run: Any = importlib.import_module("wandb").init(
        project="timm_csg",
        group=folder.name,
        name=f"{folder.name} {recipe}",
        dir=str(folder),
        config={**config, "recipe": recipe},
    )
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _check_installed(kind: str | None) -> None:
    try:
        importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else str(kind))
    except ImportError as error:
        raise ImportError(f"--log {kind} needs its package: pip install {kind}; log.csv is written anyway.") from error
