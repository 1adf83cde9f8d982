"""``timm-csg evaluate``: the command."""

from __future__ import annotations

import argparse
import json

from timm_csg.cli.options import CHECKPOINT, add_settings, given_options, names, path, whole
from timm_csg.cli.settings import DATA_OPTIONS, flag
from timm_csg.cli.terminal import Stopped, make_console

SUMMARY = "measure trained models side by side on the same images"
DESCRIPTION = """Measure models side by side on the same images: accuracy, mutual information, gates, ablation,
similarity; with a file of landmarks or boxes, or attacks to try, also parts, localisation, robustness."""
_MEASURED = ("landmarks", "boxes", "attacks", "eps", "attack_images", "filters", "encoder")


def epilog() -> str:
    """The groups of metrics."""
    from timm_csg.numbers import GROUPS

    return f"groups of metrics: {', '.join(GROUPS)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("--output", type=path, help="folder for the results (default: runs/evaluate-DATA-NUMBER)")
    parser.add_argument("--metrics", type=names, metavar="A,B", help="groups of metrics, see below")
    parser.add_argument(
        "--landmarks", type=path, metavar="FILE", help="landmarks, CSV or JSON: adds the metrics 'parts'"
    )
    parser.add_argument("--boxes", type=path, metavar="FILE", help="object boxes, CSV or JSON: adds 'localisation'")
    parser.add_argument("--attacks", type=names, default=[], metavar="A,B", help="fgsm, pgd: adds 'adversarial', slow")
    left_out = argparse.SUPPRESS  # then there is no value: what they are for is not measured, or measure decides
    parser.add_argument(
        "--eps", type=_numbers, default=left_out, metavar="A,B", help="attack strengths, grey levels of 255 (2,8)"
    )
    parser.add_argument(
        "--attack-images", type=whole, default=left_out, metavar="N", help="images that are attacked (default: 500)"
    )
    parser.add_argument(
        "--explanations", action="store_true", help="judge explanation maps, with --boxes also in boxes"
    )
    parser.add_argument(
        "--explanation-images",
        type=whole,
        default=left_out,
        metavar="N",
        help="images they are judged on (default: 200)",
    )
    parser.add_argument("--filters", action="store_true", help="judge filters, next to the values for shuffled labels")
    parser.add_argument("--encoder", metavar="NAME", help="timm model for MonoScore; with --filters")
    parser.add_argument("--seed", type=whole, default=0, help="seed of estimates, splits and attacks (default: 0)")
    parser.add_argument("--csv", action="store_true", help="also write the full gate and mutual information, as CSV")
    parser.add_argument("--json", action="store_true", help="print metrics.json instead of the table")
    add_settings(parser, only=DATA_OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and say where the files are."""
    from timm_csg.cli.comparison import comparison, explanations_table
    from timm_csg.cli.evaluate import evaluate, short_name
    from timm_csg.cli.runs import free_folder, gone_if_empty

    _check_knobs(args)
    console = make_console()
    data_options = given_options(args, DATA_OPTIONS)
    named = [short_name(data_options["data"])] if data_options.get("data") is not None else []
    output = args.output or free_folder("evaluate", *named)
    try:
        with gone_if_empty(output, is_ours=args.output is None):
            results = evaluate(
                args.checkpoints,
                groups=args.metrics,
                explanations=_pictures(args),
                output=output,
                csv=args.csv,
                seed=args.seed,
                console=None if args.quiet or args.json else console,
                **given_options(args, _MEASURED),
                **data_options,
            )
    except KeyboardInterrupt as stop:
        raise Stopped.after(stop, "the models that were finished are in the results so far.") from None
    if args.json:
        console.print(json.dumps(results, indent=2), soft_wrap=True)
        return 0
    console.print(comparison(results, console.width))
    maps = explanations_table(results)
    if maps is not None:
        console.print(maps)
    console.print(f"results: {output}", soft_wrap=True)
    return 0


def _pictures(args: argparse.Namespace) -> int:
    """On how many images maps are judged."""
    images = getattr(args, "explanation_images", 200)
    if images < 1:
        raise ValueError(f"--explanation-images must be at least 1, but is {images}.")
    return images if args.explanations else 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects numbers with commas between them, but found {text!r}") from None


def _check_knobs(args: argparse.Namespace) -> None:
    """Refuse options without an effect, as ``timm-csg train`` does."""
    rules = (("attacks", "eps"), ("attacks", "attack_images"), ("explanations", "explanation_images"))
    for needs, name in rules:
        if hasattr(args, name) and not getattr(args, needs):
            raise ValueError(f"{flag(name)} would have no effect here; add {flag(needs)}.")
