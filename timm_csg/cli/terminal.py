"""The terminal: plain text in any encoding, and commands that end in one line when they are stopped."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from rich.console import Console

INTERRUPTED, TERMINATED = 130, 143
_PLAIN = {"–": "-", "—": "-", "±": "+-", "†": "+", "×": "x", "·": ".", "…": "...", "’": "'"}


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    Args:
        text: What is saved so far and how to continue, for people.
        status: Exit status of the command.
    """

    def __init__(self, text: str = "", status: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.status = status

    @classmethod
    def after(cls, stop: KeyboardInterrupt, text: str) -> Stopped:
        """The same stop, with what is saved so far and how to continue."""
        return cls(f"stopped; {text}", stop.status if isinstance(stop, Stopped) else INTERRUPTED)


class TrainingError(RuntimeError):
    """Training cannot continue; the state of the last complete epoch is saved."""


class UnfinishedError(TrainingError):
    """All models are trained and saved, but something after that failed.

    Args:
        text: What failed.
        results: What was measured, by recipe.
    """

    def __init__(self, text: str, results: dict[str, Any]) -> None:
        super().__init__(text)
        self.results = results


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the program with the status of a failed training


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text literally: names are not markup, and ``:cat:`` is not an emoji."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """One line on stderr."""
    make_console(stderr=True).print(text, soft_wrap=True)


@contextmanager
def any_encoding() -> Iterator[None]:
    """Replace characters that the terminal's encoding lacks by plainer ones or an escape, instead of failing."""
    codecs.register_error("timm_csg.plainer", _plainer)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="timm_csg.plainer")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


def _plainer(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text, end = codecs.backslashreplace_errors(error)
    sign = error.object[error.start : error.start + 1]
    return (_PLAIN[sign], error.start + 1) if sign in _PLAIN else (text, end)


def stoppable() -> AbstractContextManager[None]:
    """Turn SIGTERM, which batch systems send before they kill, into ``Stopped``, for the time of the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(status=TERMINATED)

    return _handling(stop, signal.SIGTERM)


def unstoppable() -> AbstractContextManager[None]:
    """Ignore Ctrl-C and SIGTERM for the time of the block: the command is ending already."""
    return _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)


@contextmanager
def _handling(handler: Any, *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def forget_output() -> None:
    """After the reader of a pipe has gone: let Python's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
