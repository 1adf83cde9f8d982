"""``--log``: the numbers of every epoch for a tool that draws them, through the tool's own package."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_logger = logging.getLogger(__name__)
CSV, TENSORBOARD, WANDB = "csv", "tensorboard", "wandb"
LOGS = (TENSORBOARD, WANDB, CSV)
_PROJECT = "timm_csg"
Sink = Callable[[Mapping[str, float], int], None]


class EpochLog:
    """Passes the numbers of every epoch on; one run of the tool for each training, so that it draws them together.

    ``log.csv`` is written in any case, so ``"csv"`` adds nothing. A context manager; leaving it closes what is open.

    Args:
        kind: One of ``LOGS``, or None.
        folder: The run folder: TensorBoard's files go into ``folder/tensorboard/<recipe>``, wandb's into its own.
        config: The settings of the run, for wandb.

    Raises:
        ImportError: If the tool's package is missing; the message says how to install it.
    """

    def __init__(self, kind: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, dict(config)
        self._open = {TENSORBOARD: self._tensorboard, WANDB: self._wandb}.get(kind or CSV)
        self._module = _import(kind) if self._open is not None and kind is not None else None
        self._recipe: str | None = None
        self._sink: Sink | None = None
        self._close: Callable[[], None] = _nothing

    def __enter__(self) -> EpochLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close()
        except Exception as problem:  # as in epoch(); an error of the training goes on its way
            _logger.warning("--log could not be ended (%s: %s)", type(problem).__name__, problem)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Log a line of ``log.csv``: its numbers, at its epoch, counted from 1 as the tools do."""
        if self._open is None:
            return
        try:
            self._pass_on(row, self._open)
        except Exception as error:  # of the tool: network, disk, account; the training must not be lost to it
            _logger.warning("--log no longer works (%s: %s); log.csv goes on", type(error).__name__, error)
            self._open, self._close = None, _nothing

    def _pass_on(self, row: Mapping[str, Any], begin: Callable[[str], tuple[Sink, Callable[[], None]]]) -> None:
        if row["recipe"] != self._recipe:
            self._close()
            self._recipe = row["recipe"]
            self._sink, self._close = begin(str(row["recipe"]))
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "epoch" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self._sink is not None:
            self._sink(numbers, int(row["epoch"]) + 1)

    def _tensorboard(self, recipe: str) -> tuple[Sink, Callable[[], None]]:
        writer: Any = self._module.SummaryWriter(str(self.folder / TENSORBOARD / recipe))  # type: ignore[union-attr]

        def log(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return log, writer.close

    def _wandb(self, recipe: str) -> tuple[Sink, Callable[[], None]]:
        run: Any = self._module.init(  # type: ignore[union-attr]
            project=_PROJECT,
            group=self.folder.name,
            name=f"{self.folder.name} {recipe}",
            dir=str(self.folder),
            config=self.config | {"recipe": recipe},
        )

        def log(numbers: Mapping[str, float], step: int) -> None:
            run.log(dict(numbers), step=step)

        return log, run.finish


def _nothing() -> None:
    """There is nothing to close."""


def _import(kind: str) -> Any:
    try:
        return importlib.import_module({TENSORBOARD: "torch.utils.tensorboard", WANDB: "wandb"}[kind])
    except ImportError as error:
        raise ImportError(f"--log {kind} needs its package: pip install {kind}; log.csv is written anyway.") from error
