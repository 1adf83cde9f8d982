"""``timm-csg export``: the command."""

from __future__ import annotations

import argparse

from timm_csg.cli.options import add_settings, given_options, names, path
from timm_csg.cli.terminal import make_console

SUMMARY = "write one ONNX file: logits, evidence of every class by its own filters, a heat map, responses"
DESCRIPTION = """Write a model and its explanations to one ONNX file, which onnxruntime serves without PyTorch and
without this package."""
OUTPUTS = ("logits", "evidence", "map", "responses")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="checkpoint folder, folder of a timm-csg train run, or Hub repository user/name",
    )
    parser.add_argument("--output", type=path, default=path("model.onnx"), help="the file to write (model.onnx)")
    parser.add_argument(
        "--outputs",
        type=names,
        default=list(OUTPUTS),
        metavar="A,B",
        help=f"which outputs the file has (default: {','.join(OUTPUTS)})",
    )
    parser.add_argument("--grid", action="store_true", help="leave maps as small as the last stage, do not up-sample")
    add_settings(parser, only=["img_size"])


def run(args: argparse.Namespace) -> int:
    """Export, and say what the file holds."""
    from timm_csg.cli.checkpoints import load_with_input
    from timm_csg.cli.runs import writable_file
    from timm_csg.export import export_onnx

    writable_file(args.output, "model.onnx")
    given = given_options(args, ["img_size"])
    model, preprocessing, _ = load_with_input(args.checkpoint, {"device": "cpu", **given})
    exported = export_onnx(
        model, args.output, outputs=args.outputs, upsample=not args.grid, preprocessing=preprocessing
    )
    size = exported.path.stat().st_size / 1e6
    make_console().print(f"{exported.path} ({size:.1f} MB): {', '.join(exported.outputs)}", soft_wrap=True)
    return 0
