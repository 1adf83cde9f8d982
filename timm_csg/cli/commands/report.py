"""``timm-csg report``: the command."""

from __future__ import annotations

import argparse

from timm_csg.cli.options import CHECKPOINT, add_settings, given_options, path
from timm_csg.cli.settings import DATA_OPTIONS
from timm_csg.cli.terminal import make_console

SUMMARY = "write report.html: what each filter looks at, who owns it, why images got their class"
DESCRIPTION = "Write one HTML file that shows what a model's filters have learned; it needs no network."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("--output", type=path, default=path("report.html"), help="the file to write (report.html)")
    parser.add_argument(
        "--reference",
        metavar="CHECKPOINT",
        help="model to compare the numbers with (default: the standard model of the run)",
    )
    parser.add_argument("--title", help="title of the report")
    add_settings(parser, only=DATA_OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where."""
    from timm_csg.cli.report import report

    console = make_console()
    file = report(
        args.checkpoint,
        reference=args.reference,
        output=args.output,
        title=args.title,
        console=None if args.quiet else console,
        **given_options(args, DATA_OPTIONS),
    )
    size = file.stat().st_size / 1e6
    console.print(f"{file} ({size:.1f} MB): open it in a browser", soft_wrap=True)
    return 0
