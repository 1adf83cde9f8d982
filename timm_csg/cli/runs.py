"""Run folders: a free name, taken at once; a folder that one process writes to; what may be there already."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from timm_csg.checkpoint import replacing
from timm_csg.cli.distributed import told_by_first
from timm_csg.cli.settings import MACHINE_OPTIONS, RUN_SETTINGS, TrainSettings
from timm_csg.cli.spelling import file_stem
from timm_csg.cli.state import STATE

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as ``replacing`` names them


def free_folder(*parts: str, folder: Path = Path("runs")) -> Path:
    """Make a folder that did not exist: the parts, such as data and model, and a number. Never given to two callers.

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
            raise ValueError(f"cannot make the folder {found}: {error}; choose another --output.") from error
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
    """A folder that files can be written into, made before the work; gone again if nothing was written.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error}; choose another --output.") from error
    with gone_if_empty(folder, is_ours=is_new):
        yield


def writable_file(path: Path) -> None:
    """See whether a file can be written, before the work is done.

    Raises:
        ValueError: If it is a folder, or its folder is not there or cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file in it, such as {path / 'report.html'}.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of --output {path} does not exist; make it, or choose another one.")
    with folder_for_results(path.parent):
        pass


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """The run folder, made if it does not exist, and ours alone; gone again if nothing was written into it.

    Raises:
        ValueError: If another process writes to it, or it cannot be made.
    """
    lock = FileLock(output / ".lock")
    with folder_for_results(output):
        try:
            with contextlib.suppress(NotImplementedError):  # some file systems have no locks
                lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"another process is writing to {output}; wait, or choose another --output.") from error
        try:
            yield
        finally:
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()


def read_settings(output: Path) -> TrainSettings:
    """The settings of an earlier run in this folder, for ``--resume``.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = output / RUN_SETTINGS

    def read() -> str:
        if not path.is_file():
            raise ValueError(f"nothing to resume: {path} does not exist; --resume takes the folder of an earlier run.")
        return path.read_text(encoding="utf-8")

    return TrainSettings.from_json(told_by_first("settings", read))


def check_folder(settings: TrainSettings, output: Path) -> None:
    """Refuse a folder with epochs of a run that had other settings; another machine's device and paths may differ.

    Raises:
        ValueError: If there is such a run.
    """
    if not any(output.glob(f"*/{STATE}")):
        return
    machine = {name: getattr(settings, name) for name in MACHINE_OPTIONS}
    earlier = replace(read_settings(output), **machine)
    if earlier != replace(settings, epochs=settings.epochs or earlier.epochs):
        raise ValueError(f"{output} holds a run with other settings; choose another --output, or --resume {output}.")


def prepare_folder(settings: TrainSettings, output: Path) -> None:
    """Write the settings, and clear away what a killed process was writing.

    Raises:
        ValueError: If the folder cannot be written.
    """
    try:
        for path in output.rglob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        with replacing(output / RUN_SETTINGS) as temporary:
            temporary.write_text(settings.to_json(), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to the folder {output}: {error}; choose another --output.") from error
