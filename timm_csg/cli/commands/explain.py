"""``timm-csg explain``: the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from timm_csg.cli.options import CHECKPOINT, add_settings, given_options, names, path, whole
from timm_csg.cli.settings import IMAGE_OPTIONS
from timm_csg.cli.terminal import make_console, say

SUMMARY = "explain why images get their class: heat maps, and a table of the filters"
DESCRIPTION = """Explain why images get their class: heat maps as PNG files, and a table of the filters behind each
answer."""
METHODS = (
    "evidence_map", "guided_evidence_map", "owner_map", "grad_cam", "cam", "coarse_map", "guided_grad_cam", "gradient",
    "guided_backprop", "deconvnet",
)  # fmt: skip
FILTERS = "filters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=path, help="picture files, or folders of them")
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument(
        "--method",
        type=lambda text: names(text.replace("-", "_")),
        default=["grad_cam"],
        metavar="A,B",
        help=f"maps to draw: {', '.join([*METHODS, FILTERS])} (default: grad_cam)",
    )
    parser.add_argument("--target", metavar="CLASS", help="name or number of the class to explain (default: predicted)")
    parser.add_argument(
        "--against",
        metavar="CLASS",
        help="name or number of another class: what decides between it and the class that is explained",
    )
    parser.add_argument("--top", type=whole, default=5, help="filters for each image (default: 5)")
    parser.add_argument("--output", type=path, default=Path("explained"), help="folder for the pictures (explained)")
    add_settings(parser, only=IMAGE_OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Explain, and print the table."""
    from timm_csg.cli.explain import explain
    from timm_csg.cli.explain_view import contrast_table, explanation_table

    console, seen = make_console(), 0

    def tell(path: Path) -> None:
        nonlocal seen
        seen += 1
        if not args.quiet and seen % 20 == 0:
            say(f"{seen} pictures so far")

    found = explain(
        args.images,
        args.checkpoint,
        methods=args.method,
        target=args.target,
        against=args.against,
        top=args.top,
        output=args.output,
        progress=tell,
        **given_options(args, IMAGE_OPTIONS),
    )
    console.print((explanation_table if args.against is None else contrast_table)(found, args.checkpoint))
    count = sum(len(each.pictures) for each in found)
    console.print(f"{count} {'picture' if count == 1 else 'pictures'} in {args.output}", soft_wrap=True)
    return 0 if len(found) == seen else 2  # those that cannot be read have been named
