"""``timm-csg train``: the command."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from timm_csg.cli.options import add_settings, given_options, path
from timm_csg.cli.settings import MACHINE_OPTIONS, STANDARD, TrainSettings, flag
from timm_csg.cli.terminal import Stopped, UnfinishedError, make_console

SUMMARY = "train recipes side by side and measure them; without options: scikit-learn's digits, under two minutes"
DESCRIPTION = """Train one or several recipes on one data set and measure them. Without options: standard
training, the paper's gate and assigned filters on scikit-learn's handwritten digits."""


def epilog() -> str:
    """The recipes."""
    from timm_csg.recipes import RECIPES

    lines = [f"  {name:12} {recipe.summary}" for name, recipe in RECIPES.items()]
    return "\n".join(["recipes:", f"  {STANDARD:12} plain timm training", *lines])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--output", type=path, help="run folder (default: runs/DATA-MODEL-NUMBER)")
    parser.add_argument(
        "--resume", type=path, metavar="FOLDER", help="resume an interrupted run with its saved settings"
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Train, print the table and the run folder."""
    from timm_csg.cli.display import intervals, result_table, verdicts
    from timm_csg.cli.runs import gone_if_empty
    from timm_csg.cli.train import train

    console = make_console()
    settings, output = _settings_and_output(args)
    try:
        with gone_if_empty(output, is_ours=args.output is None):
            results = train(settings, output, console=None if args.quiet else console)
    except KeyboardInterrupt as stop:
        raise _stopped(stop, output) from None
    except UnfinishedError as error:
        if error.results:
            console.print(result_table(error.results))
        raise
    if results:  # the first process has them
        console.print(result_table(results))
        for line in (*intervals(results), *verdicts(results)):
            console.print(line, markup=False, highlight=False)
        console.print(f"run folder: {output}", soft_wrap=True)
    return 0


def _settings_and_output(args: argparse.Namespace) -> tuple[TrainSettings, Path]:
    from timm_csg.cli.distributed import told_by_first
    from timm_csg.cli.runs import RunFolder
    from timm_csg.cli.train import default_output

    options = given_options(args, [item.name for item in fields(TrainSettings)])
    if args.resume is None:
        settings = TrainSettings(**options)
        return settings, args.output or Path(told_by_first("output", lambda: str(default_output(settings))))
    changed = sorted(set(options) - set(MACHINE_OPTIONS))
    if changed or args.output is not None:
        named = ", ".join(map(flag, changed)) or "--output"
        raise ValueError(
            f"--resume uses the saved settings of the run and cannot be combined with {named}; it takes "
            f"{', '.join(map(flag, MACHINE_OPTIONS))} only."
        )
    return replace(RunFolder(args.resume).settings(), **options), args.resume


def _stopped(stop: KeyboardInterrupt, output: Path) -> Stopped:
    from timm_csg.cli.distributed import is_several
    from timm_csg.cli.runs import RunFolder

    if not RunFolder(output).settings_file.is_file():
        return Stopped.after(stop, "training had not started.")
    models = "the last complete epoch is saved" if is_several() else f"models so far are in {output}/*/model"
    return Stopped.after(stop, f"{models}; continue with: timm-csg train --resume {output}")
