"""Names that are spelled nearly right, and names that become files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection


def did_you_mean(name: str, known: Collection[str], most: int = 1) -> str:
    """The end of a sentence that suggests names with a similar spelling; empty if there are none.

    Example:
        >>> did_you_mean("asigned", ["paper", "assigned"])
        '; did you mean assigned?'
    """
    alike = difflib.get_close_matches(name, list(known), n=most)
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


def check_choice(what: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that is not among those known.

    Args:
        what: What is named, such as ``"--recipe"``.
        name: The name.
        known: The valid ones; listed if they are few and none has a similar spelling.

    Raises:
        ValueError: If it is another one.
    """
    if name in known:
        return
    listed = f"; known are {', '.join(known)}." if len(known) <= 12 else "."
    raise ValueError(f"unknown {what} {name!r}{did_you_mean(name, known) or listed}")


def file_stem(text: str) -> str:
    """A text as the first part of a file's name: without separators, and short enough for a suffix.

    Example:
        >>> file_stem("run/paper"), len(file_stem("a" * 300))
        ('run_paper', 150)
    """
    return os.fsencode(re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", text))[:150].decode("utf-8", "ignore")
