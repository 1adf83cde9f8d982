"""Where a report comes from: date, checkpoint, seed, data and command, without the folders of the machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from timm_csg.manifest import WEIGHTS, sha256


def provenance(
    folder: Path | None, *, seed: int | None = None, data: str | None = None, now: datetime | None = None
) -> dict[str, str]:
    """Rows for the page about a report.

    Args:
        folder: Of the checkpoint; None: it lies in none.
        seed: Of the training; None: not known.
        data: The data and its counts, in words.
        now: The date; None: now.

    Returns:
        Text by heading; what is not known is left out.
    """
    rows = {"Date": (now or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M %Z").strip()}
    weights = None if folder is None else folder / WEIGHTS
    if weights is not None and weights.is_file():
        rows["Weights"] = f"{WEIGHTS}, SHA-256 {sha256(weights)}"
    if data is not None:
        rows["Data"] = data
    if seed is not None:
        rows["Seed of the training"] = str(seed)
    command = command_in_words(sys.argv)
    if command is not None:
        rows["Command"] = command
    return rows


def command_in_words(arguments: Sequence[str]) -> str | None:
    """The command that is running, its paths without the folders above them; None if it is another program's.

    Example:
        >>> command_in_words(["/usr/bin/timm-csg", "report", "/home/me/run", "--data", "folder:/data/my photos"])
        "timm-csg report run --data 'folder:my photos'"
        >>> command_in_words(["/usr/bin/pytest"]) is None
        True
    """
    program = Path(arguments[0]) if arguments else Path()
    if program.stem != "timm-csg" and program.parts[-2:] != ("timm_csg", "__main__.py"):
        return None
    return shlex.join(["timm-csg", *map(_without_folders, arguments[1:])])


def _without_folders(argument: str) -> str:
    head, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    kind, colon, path = value.partition(":")
    if colon and kind in ("folder", "local-dir"):
        return f"{head}{sign}{kind}:{Path(path).name or path}"
    is_path = value.startswith(("/", ".", "~", "\\")) or Path(value).is_absolute()
    return f"{head}{sign}{Path(value).name or value}" if is_path else argument
