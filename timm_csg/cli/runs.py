"""Folders for results: where everything of a ``timm-csg train`` run lies, and places that are free to write to."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from timm_csg.checkpoint import replacing
from timm_csg.cli.distributed import told_by_first
from timm_csg.cli.settings import MACHINE_OPTIONS, STANDARD, TrainSettings
from timm_csg.manifest import CONFIG, folder_named

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as ``replacing`` names them
_STATE = "state.pt"


class RunFolder:
    """The folder of a ``timm-csg train`` run; written by train, read by resume, evaluate, explain, report and push.

    ::

        run/
          settings.json            what was asked for; --resume reads it
          model/                   the last recipe's model, for timm_csg.from_pretrained and for plain timm
          metrics.json  log.csv    all recipes
          figures/*.png            gates and mutual information
          report.html              what the last gated recipe's filters look at, beside the standard model
          <recipe>/                state.pt for --resume, and the recipe's own model/

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings_file, self.metrics = self.path / "settings.json", self.path / "metrics.json"
        self.log, self.report = self.path / "log.csv", self.path / "report.html"
        self.model, self.figures = self.path / "model", self.path / "figures"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, checkpoint: str | Path) -> RunFolder | None:
        """The run that a checkpoint is or lies in; None if it lies in none.

        Args:
            checkpoint: A name or a folder, also as ``local-dir:folder``.
        """
        folder = folder_named(checkpoint)
        whole = folder.resolve()
        above = whole.parents[:2] if whole.name == "model" else ()
        return next((run for place in (folder, *above) if (run := cls(place)).exists()), None)

    def exists(self) -> bool:
        """Whether there is a run, and not another program's ``settings.json``."""
        if not self.settings_file.is_file():
            return False
        text = self.settings_file.read_text(encoding="utf-8", errors="replace")
        return any(self.path.glob("*/state.*")) or all(f'"{name}":' in text for name in ("data", "model", "recipe"))

    def state_of(self, recipe: str) -> Path:
        """The file that a recipe's training is resumed from."""
        return self.path / recipe / _STATE

    def model_of(self, recipe: str) -> Path:
        """The folder of a recipe's model."""
        return self.path / recipe / "model"

    def gate_figure(self, recipe: str) -> Path:
        """The picture of a recipe's gate."""
        return self.figures / f"gate_{recipe}.png"

    def models(self) -> list[Path]:
        """Folders of the recipes' models as far as they are saved, in the order of the settings."""
        recipes = self.settings().recipe or []
        found = [config.parent for config in sorted(self.path.glob(f"*/model/{CONFIG}"))]
        places = {self.model_of(recipe): number for number, recipe in enumerate(recipes)}
        return sorted(found, key=lambda folder: places.get(folder, len(recipes)))

    def standard_beside(self, model: Path) -> Path | None:
        """The standard model to compare another one with; None if there is none, or it is that one."""
        standard = self.model_of(STANDARD)
        return standard if (standard / CONFIG).is_file() and standard.resolve() != model.resolve() else None

    def settings(self) -> TrainSettings:
        """The settings, in several processes as the first one reads them.

        Raises:
            ValueError: If there are none, or they are damaged.
        """

        def read() -> str:
            if not self.settings_file.is_file():
                missing = f"nothing to resume: {self.settings_file} does not exist"
                raise ValueError(f"{missing}; --resume takes the folder of an earlier run.")
            return self.settings_file.read_text(encoding="utf-8", errors="replace")

        return TrainSettings.from_json(told_by_first(f"settings of {self}", read))

    def check(self, settings: TrainSettings) -> None:
        """Refuse a folder with epochs of a run that had other settings; another machine's device and paths may differ.

        Raises:
            ValueError: If there is such a run.
        """
        if not any(self.path.glob(f"*/{_STATE}")):
            return
        machine = {name: getattr(settings, name) for name in MACHINE_OPTIONS}
        earlier = replace(self.settings(), **machine)
        if earlier != replace(settings, epochs=settings.epochs or earlier.epochs):
            raise ValueError(f"{self} holds a run with other settings; choose another --output, or --resume {self}.")

    def prepare(self, settings: TrainSettings) -> None:
        """Write the settings, and clear away what a killed process was writing.

        Raises:
            ValueError: If the folder cannot be written.
        """
        try:
            for path in self.path.rglob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()
            with replacing(self.settings_file) as temporary:
                temporary.write_text(settings.to_json(), encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder, created if it does not exist, and ours alone; removed again if nothing was written into it.

        Raises:
            ValueError: If another process writes to it, or it cannot be made.
        """
        lock = FileLock(self.path / ".lock")
        with folder_for_results(self.path):
            try:
                with contextlib.suppress(NotImplementedError):  # some file systems have no locks
                    lock.acquire(blocking=False)
            except Timeout as error:
                raise ValueError(f"another process is writing to {self}; wait, or choose another --output.") from error
            try:
                yield
            finally:
                if lock.is_locked:
                    Path(lock.lock_file).unlink(missing_ok=True)
                    lock.release()


def file_stem(text: str) -> str:
    """A text as the first part of a file's name: without separators, and short enough for a suffix.

    Example:
        >>> file_stem("run/paper"), len(file_stem("a" * 300))
        ('run_paper', 150)
    """
    return os.fsencode(re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", text))[:150].decode("utf-8", "ignore")


def free_folder(*parts: str, folder: Path = Path("runs")) -> Path:
    """Make a folder that did not exist; never given to two callers.

    Args:
        *parts: Of its name, such as data and model; a number follows.
        folder: Where to make it.

    Raises:
        ValueError: If it cannot be made.
    """
    stem = "-".join(file_stem(part) for part in parts)
    number = 1
    while True:
        found = folder / f"{stem}-{number}"
        try:
            found.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(found, error) from error
        else:
            return found


@contextlib.contextmanager
def gone_if_empty(folder: Path, *, is_ours: bool = True) -> Iterator[None]:
    """Remove a folder that we made at the end of the block if nothing was written into it."""
    try:
        yield
    finally:
        if is_ours:
            with contextlib.suppress(OSError):  # it holds something, as it should
                folder.rmdir()


@contextlib.contextmanager
def folder_for_results(folder: Path) -> Iterator[None]:
    """A folder that files can be written into, created before the work; removed again if nothing was written.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error
    with gone_if_empty(folder, is_ours=is_new):
        yield


def writable_file(path: Path, example: str = "report.html") -> None:
    """Check that a file can be written, before the work is done.

    Args:
        path: The file.
        example: What such a file may be called.

    Raises:
        ValueError: If it is a folder, or its folder does not exist or cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file in it, such as {path / example}.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of --output {path} does not exist; create it, or choose another one.")
    with folder_for_results(path.parent):
        pass


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to the folder {folder}: {error}; choose another --output.")
