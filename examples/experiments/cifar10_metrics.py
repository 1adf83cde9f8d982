"""How entangled are these CIFAR-10 networks? Every metric of timm_csg, groups of checkpoints side by side.

PYTHONPATH=examples python examples/experiments/cifar10_metrics.py --data cifar10.npz --output runs/table \
    standard=runs/s0,runs/s1 assigned=runs/a0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import timm
from cifar10_attacks import gate_numbers, measure_attacks
from cifar_resnet20 import Batches, load_cifar  # importing it registers resnet20_cifar
from safetensors.torch import load_file

import timm_csg
from timm_csg import measuring, metrics


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=".npz of encoded pictures, see load_cifar")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--attack-images", type=int, default=1000, help="the first of the test images")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("groups", nargs="+", help="NAME=FOLDER,FOLDER,...: checkpoints of one recipe")
    args = parser.parse_args(arguments)
    images, targets = load_cifar(args.data, "test")
    test = Batches(images[: args.test_images], targets[: args.test_images], 250, is_training=False)
    few = Batches(images[: args.attack_images], targets[: args.attack_images], 250, is_training=False)
    results: dict[str, list[dict]] = {}
    for name, _, folders in (group.partition("=") for group in args.groups):
        for folder in folders.split(","):
            model = load(Path(folder))
            results.setdefault(name, []).append(measure(model, test) | measure_attacks(model, few))
            print(name, folder, json.dumps(results[name][-1]), flush=True)
    rows = list(dict.fromkeys(row for runs in results.values() for run in runs for row in run))
    lines = [["metric", *results], ["---"] * (1 + len(results))]
    lines += [[row, *(cell([run[row] for run in runs if row in run]) for runs in results.values())] for row in rows]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.output}.json").write_text(json.dumps(results, indent=2) + "\n")
    Path(f"{args.output}.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return results


def cell(values: list[float]) -> str:
    """Mean and standard deviation over checkpoints."""
    return "–" if not values else f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def load(folder: Path):
    """A checkpoint of timm_csg, or a plain timm one of resnet20_cifar."""
    if (folder / "mechanism" / "timm_csg.safetensors").is_file():
        return timm_csg.from_pretrained(folder)
    model = timm.create_model("resnet20_cifar")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def measure(model, test: Batches) -> dict[str, float]:
    seen = measuring.collect(model, test)
    mutual = metrics.mutual_information(seen.features, seen.targets, 10)
    gate = model.mechanism.class_filter_matrix() if timm_csg.is_differentiated(model) else None
    matrix = mutual if gate is None else gate  # a plain model's filters belong to the class they reveal most about
    owners, equal = metrics.owners(matrix), metrics.top_filters(matrix, len(mutual[0]) // 10)
    interval = metrics.mutual_information_score_interval(seen.features, seen.targets, 10, resamples=50)
    result = {"accuracy": metrics.accuracy(seen.logits, seen.targets), "MIS": float(interval.estimate)}
    result["standard error of MIS (images)"] = float(interval.standard_error)
    result["selectivity"] = float(metrics.mutual_information_per_filter(mutual).selectivity.mean())
    if gate is not None:
        result |= {"gated accuracy": metrics.accuracy(seen.gated_logits, seen.targets), **gate_numbers(gate, mutual)}
    per_class = owners.bincount(minlength=10)
    result |= {"fewest filters of a class": int(per_class.min()), "most filters of a class": int(per_class.max())}
    weight = measuring.stage_weight(model).weight
    similarities = metrics.weight_similarity(weight), metrics.activation_similarity(seen.features)
    for name, similarity in zip(("weights", "activations"), similarities, strict=True):
        summary = metrics.summarize_similarity(similarity, owners)
        result |= {f"similar {name}, one class": summary.within, f"similar {name}, across classes": summary.across}
    for name, filters in ("its filters", owners), (f"{len(mutual[0]) // 10} filters each", equal):
        for what, keep_only in (("without", False), ("with only", True)):
            ablation = measuring.ablate(model, test, filters, 10, keep_only=keep_only)
            result |= {f"class {what} {name}": ablation.own, f"others {what} {name}": ablation.others}
    return result


if __name__ == "__main__":
    main()
