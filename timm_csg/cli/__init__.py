"""The command line: ``timm-csg`` or ``python -m timm_csg``.

Parsing imports nothing heavy; each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.logging import RichHandler

from timm_csg.cli.commands import COMMANDS
from timm_csg.cli.plugins import import_plugins
from timm_csg.cli.terminal import (
    INTERRUPTED,
    Stopped,
    TrainingError,
    any_encoding,
    forget_output,
    make_console,
    say,
    stoppable,
    unstoppable,
)
from timm_csg.version import __version__

_PIPE_CLOSED = 141
_NO_MEMORY = "out of memory; lower --batch-size, --img-size or --workers, or stop other programs."
# What PyTorch says when the machine is at its limit, and what to do.
_REASONS = {
    "out of memory": "out of memory; lower --batch-size or --img-size, or stop other programs that use the device.",
    "MemoryError": _NO_MEMORY,
    "can't allocate memory": _NO_MEMORY,
    "DataLoader worker": "a process that loads images exited unexpectedly (killed or out of memory?); try --workers 0.",
    "No space left on device": "the disk or the shared memory is full; free space, or try --workers 0.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; None: ``sys.argv``.

    Returns:
        Exit status: 0, 1 if training failed, 2 for wrong input, 130 when interrupted, 143 when terminated.
    """
    if "MASTER_ADDR" in os.environ:  # started by torchrun, or with srun as its users do
        from timm_csg.cli.distributed import is_several, run_together

        if is_several():
            return run_together(lambda: _main(arguments))
    return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    with any_encoding(), stoppable():
        try:
            args = _parse(arguments)
            _start_logging(quiet=args.quiet)
            return _run(args)
        except KeyboardInterrupt as stop:
            with unstoppable():
                _say(str(stop) or "stopped.")
                return stop.status if isinstance(stop, Stopped) else INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    try:
        import_plugins(args.plugin)
        status: int = COMMANDS[args.command].run(args)
    except BrokenPipeError:
        forget_output()
        return _PIPE_CLOSED
    except TrainingError as error:
        _say(f"timm-csg {args.command}: {error}")
        return 1
    except (ValueError, TypeError, ImportError, OSError) as error:
        _say(f"timm-csg {args.command}: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        reason = next((reason for sign, reason in _REASONS.items() if sign in f"{type(error).__name__} {error}"), None)
        if reason is None:
            raise  # a fault of ours, which a traceback helps to find
        _say(f"timm-csg {args.command}: {reason}")
        return 1
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without all options.

    The list below the options is built only when help is requested: it needs imports that parsing does not.
    """

    make_epilog: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        """Say it, and end."""
        plain = message.removeprefix("argument ").replace(": expect", " expect")
        say(f"{self.prog}: {plain}; see {self.prog} --help.")
        raise SystemExit(2)

    def format_help(self) -> str:
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()
        return super().format_help()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        from timm_csg.checks import nearest

        known = [option for action in args.parser._actions for option in action.option_strings]
        question = nearest(unknown[0].partition("=")[0], known)
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}.{question}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="timm-csg", description="Make timm models interpretable by training.")
    parser.add_argument("--version", action="version", version=f"timm_csg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.make_epilog = getattr(command, "epilog", None)
        command.add_arguments(one)
        one.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="FILE",
            help="Python file or module to import first, for example one that registers a model; may be repeated",
        )
        one.add_argument("--quiet", action="store_true", help="print no progress and no log lines")
        one.set_defaults(parser=one)
    return parser


class _Lines(logging.Handler):
    """Plain lines, unwrapped, where the output is not a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        say(level + self.format(record))


def _start_logging(*, quiet: bool) -> None:
    console = make_console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False) if console.is_terminal else _Lines()
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", handlers=[handler])
    for name in ("timm", "torch", "matplotlib", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself: our log would repeat everything


def _say(text: str) -> None:
    """Say why the command ends; of several processes only one does."""
    if "MASTER_ADDR" in os.environ:
        from timm_csg.cli.distributed import first_to_fail

        if not first_to_fail():
            return
    say(text)
