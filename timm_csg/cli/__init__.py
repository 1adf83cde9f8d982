"""The command line: ``timm-csg`` or ``python -m timm_csg``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from timm_csg.version import __version__

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; None: ``sys.argv``.

    Returns:
        Exit status: 0, 1 if training failed, 2 for wrong input, 130 when interrupted.
    """
    parser = _parser()
    namespace = parser.parse_args(arguments)
    console = Console(stderr=False)
    quiet = namespace.quiet or not console.is_terminal
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    logging.getLogger("timm").setLevel(logging.WARNING)
    from timm_csg.cli.engine import TrainingError

    run = {"train": _train, "push": _push}[namespace.command]
    try:
        return run(namespace, console, quiet)
    except (ValueError, TypeError, ImportError, OSError) as error:
        _say(f"timm-csg {namespace.command}: {error}")
        return 2
    except TrainingError as error:
        _say(f"timm-csg {namespace.command}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    from timm_csg.cli.push import add_push_arguments
    from timm_csg.cli.settings import add_arguments
    from timm_csg.recipes import RECIPES

    parser = argparse.ArgumentParser(prog="timm-csg", description="Make timm models interpretable by training.")
    parser.add_argument("--version", action="version", version=f"timm_csg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    recipes = "\n".join(f"  {name:12} {recipe.summary}" for name, recipe in RECIPES.items())
    train = commands.add_parser(
        "train",
        help="train recipes side by side and measure them; without options: scikit-learn's digits, under two minutes",
        description="Train one or several recipes on one data set and measure them. Without options: standard\n"
        "training, the paper's gate and the competitive gate on scikit-learn's handwritten digits.",
        epilog=f"recipes:\n  {'standard':12} plain timm training\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--output", type=Path, help="run folder (default: runs/DATA-MODEL-NUMBER)")
    train.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with an interrupted run; its settings hold")
    train.add_argument("--quiet", action="store_true", help="no progress; implied where the output is not a terminal")
    add_arguments(train)
    push = commands.add_parser(
        "push",
        help="push a saved model to the Hugging Face Hub",
        description="Push a folder made by timm-csg train or save_pretrained to the Hugging Face Hub, in one commit.",
    )
    push.add_argument("--quiet", action="store_true", help="no progress; implied where the output is not a terminal")
    add_push_arguments(push)
    return parser


def _train(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.display import result_table
    from timm_csg.cli.settings import TrainSettings
    from timm_csg.cli.train import default_output, read_settings, train

    options = {
        key: value for key, value in vars(namespace).items() if key not in ("command", "output", "resume", "quiet")
    }
    if namespace.resume is not None:
        changed = sorted(set(options) - {"device", "workers", "data_dir"})
        if changed or namespace.output is not None:
            named = ", ".join("--" + name.replace("_", "-") for name in changed) or "--output"
            raise ValueError(f"--resume goes on with the settings of the run; it cannot be combined with {named}.")
        output = namespace.resume
        settings = TrainSettings(**(vars(read_settings(output)) | options))
    else:
        settings = TrainSettings(**options)
        output = namespace.output or default_output(settings)
    try:
        results = train(settings, output, console=console, quiet=quiet)
    except KeyboardInterrupt:
        _say(f"stopped; models so far are in {output}/*/model; go on with: timm-csg train --resume {output}")
        return _INTERRUPTED
    console.print(result_table(results))
    console.print(f"run folder: {output}", soft_wrap=True, highlight=False)
    return 0


def _push(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.push import push

    return push(namespace, console, quiet=quiet)


def _say(text: str) -> None:
    Console(file=sys.stderr, stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)
