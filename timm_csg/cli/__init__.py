"""The command line: ``timm-csg`` or ``python -m timm_csg``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from timm_csg.version import __version__

_INTERRUPTED = 130
_QUIET = "no progress, no log lines; implied where the output is not a terminal"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; None: ``sys.argv``.

    Returns:
        Exit status: 0, 1 if training failed, 2 for wrong input, 130 when interrupted.
    """
    if "MASTER_ADDR" in os.environ:  # started by torchrun, or with srun as its users do
        from timm_csg.cli.distributed import is_several, run_together

        if is_several():
            return run_together(lambda: _main(arguments))
    return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
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

    run = {
        "train": _train,
        "evaluate": _evaluate,
        "inspect": _inspect,
        "explain": _explain,
        "report": _report,
        "push": _push,
    }[namespace.command]
    try:
        return run(namespace, console, quiet)
    except (ValueError, TypeError, ImportError, OSError) as error:
        _say(f"timm-csg {namespace.command}: {error}")
        return 2
    except TrainingError as error:
        _say(f"timm-csg {namespace.command}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    from timm_csg.cli.evaluate import add_evaluate_arguments
    from timm_csg.cli.explain import add_explain_arguments
    from timm_csg.cli.inspect import add_inspect_arguments
    from timm_csg.cli.push import add_push_arguments
    from timm_csg.cli.report import add_report_arguments
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
    add_arguments(train)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure trained models side by side on the same images",
        description="Measure models side by side on the same images: accuracy, mutual information, gates, ablation,\n"
        "similarity; with a file of landmarks or boxes, or attacks to try, also parts, localisation, robustness.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_evaluate_arguments(evaluate)
    inspect = commands.add_parser(
        "inspect",
        help="say what this package finds in a model: last stage, head, mechanisms, explanations, owners of filters",
        description="Say what this package finds in a model. Of a timm name no weights are downloaded or made.",
    )
    add_inspect_arguments(inspect)
    explain = commands.add_parser(
        "explain",
        help="say why images are given their class: pictures of where, a table of the filters",
        description="Say why images are given their class: heat maps as PNG files, and a table of the filters behind\n"
        "each answer.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_explain_arguments(explain)
    report = commands.add_parser(
        "report",
        help="write report.html: what each filter looks at, who owns it, why images got their class",
        description="Write one HTML file that shows what a model's filters have learned; it needs no network.",
    )
    add_report_arguments(report)
    push = commands.add_parser(
        "push",
        help="push a saved model to the Hugging Face Hub",
        description="Push a folder made by timm-csg train or save_pretrained to the Hugging Face Hub, in one commit.",
    )
    add_push_arguments(push)
    for command in commands.choices.values():
        command.add_argument("--quiet", action="store_true", help=_QUIET)
    return parser


def _train(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.display import result_table
    from timm_csg.cli.distributed import is_several, told_by_first
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
        output = namespace.output or Path(told_by_first("output", lambda: str(default_output(settings))))
    try:
        results = train(settings, output, console=console, quiet=quiet)
    except KeyboardInterrupt:
        models = "the last whole epoch is on disk" if is_several() else f"models so far are in {output}/*/model"
        _say(f"stopped; {models}; go on with: timm-csg train --resume {output}")
        return _INTERRUPTED
    if results:  # the first process has them
        console.print(result_table(results))
        console.print(f"run folder: {output}", soft_wrap=True, highlight=False)
    return 0


def _evaluate(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.evaluate import run_evaluate

    try:
        return run_evaluate(namespace, console, quiet=quiet)
    except KeyboardInterrupt:
        _say("stopped; the models that were finished are in the results so far.")
        return _INTERRUPTED


def _inspect(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.inspect import run_inspect

    return run_inspect(namespace, console)


def _explain(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.explain import run_explain

    return run_explain(namespace, console)


def _report(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.report import run_report

    return run_report(namespace, console, quiet=quiet)


def _push(namespace: argparse.Namespace, console: Console, quiet: bool) -> int:
    from timm_csg.cli.push import push

    return push(namespace, console, quiet=quiet)


def _say(text: str) -> None:
    """Say why the command ends; of several processes only one does."""
    from timm_csg.cli.distributed import first_to_fail

    if not first_to_fail():
        return
    Console(file=sys.stderr, stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)
