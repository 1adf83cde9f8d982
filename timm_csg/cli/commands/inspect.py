"""``timm-csg inspect``: the command."""

from __future__ import annotations

import argparse
import json

from timm_csg.cli.terminal import make_console

SUMMARY = "show what this package finds in a model: last stage, head, mechanisms, explanations, owners of filters"
DESCRIPTION = "Show what this package finds in a model. For a timm name, no weights are downloaded or allocated."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("model", nargs="+", help="timm model name, checkpoint folder, or Hub repository user/name")
    parser.add_argument("--json", action="store_true", help="print JSON: one object, or a list of several")


def run(args: argparse.Namespace) -> int:
    """Inspect every named model, and print.

    Raises:
        ValueError: If the model does not exist.
    """
    from timm_csg.cli.inspect import inspect
    from timm_csg.cli.inspect_view import inspection_view

    console = make_console()
    found = []
    for name in args.model:
        found.append(inspect(name))
        if not args.json:
            console.print(inspection_view(found[-1]), "")
    if args.json:
        console.print(json.dumps(found[0] if len(found) == 1 else found, indent=2), soft_wrap=True)
    return 0
