"""Fine-tune the last stage of a pretrained network on animal pictures: assigned filters, standard training, rivals.

python examples/experiments/fine_tuning.py --data animalparts --weights local-dir:mobilenetv2 --cache frozen.pt

One line of JSON for each rate and seed is added to --output. docs/results.md has the commands of its tables.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from frozen_animals import Animals, choose, frozen_features, load_network, without_frozen_layers
from owner_numbers import measure
from rivals import RIVALS, Loss
from torch import nn

import timm_csg
from timm_csg.mechanisms import AssignedConfig
from timm_csg.recipes import RECIPES

METHODS = ["assigned", "random", "paper", "released", *RIVALS]


def differentiate(model: nn.Module, animals: Animals, args: argparse.Namespace) -> timm_csg.TrainingMixin:
    """Give the model its mechanism, and assign filters; ``random`` deals the same filters out without looking."""
    loop, classes = timm_csg.TrainingMixin(), len(animals.classes)
    if args.method in RECIPES and args.method != "assigned":
        timm_csg.differentiate(model, classes, mechanism=RECIPES[args.method].mechanism)
        loop.schedule = RECIPES[args.method].schedule
        return loop
    config = AssignedConfig(filters_per_class=args.filters_per_class, solo_weight=args.solo_weight)
    timm_csg.differentiate(model, classes, mechanism=config)
    loop.schedule, mechanism = timm_csg.Joint(), model.mechanism
    print(timm_csg.assign_filters(model, animals.plain()), flush=True)
    if args.method == "random":
        order = torch.randperm(mechanism.num_filters)
        mechanism.assign_(mechanism.assignment[:, order], mechanism.mean, mechanism.variance)
    return loop


def parameter_groups(
    model: nn.Module, args: argparse.Namespace, rate: float, *, with_mechanism: bool
) -> list[dict[str, Any]]:
    """Groups of the stage (timm's, one for each layer, with --layer-decay), the classifier and the mechanism."""
    head_rate = args.head_rate or 4 * rate
    known = args.method in RECIPES and args.method != "assigned"
    gate_rate = RECIPES[args.method].gate_lr / 10 if known else 4 * rate
    if args.layer_decay:
        return timm_csg.param_groups(
            model, lr=rate, head_lr=head_rate, gate_lr=gate_rate, weight_decay=0.05, layer_decay=args.layer_decay
        )
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in named if name.startswith("classifier")]
    mechanism = [parameter for name, parameter in named if "mechanism" in name]
    stage = [parameter for name, parameter in named if not name.startswith("classifier") and "mechanism" not in name]
    groups = [{"params": stage, "lr": rate}, {"params": head, "lr": head_rate}]
    if with_mechanism:
        groups.append({"params": mechanism, "lr": gate_rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def train(model: nn.Module, animals: Animals, args: argparse.Namespace, rate: float) -> Loss | None:
    """Train in place: AdamW, one cycle, float32. Returns the rival's loss, or None with a mechanism."""
    rival, loop = None, None
    if args.method in RIVALS:
        rival = RIVALS[args.method](model, animals.plain(), len(animals.classes), args.filters_per_class)
        if rival.of_batch is None:
            return rival
    else:
        loop = differentiate(model, animals, args)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args, rate, with_mechanism=loop is not None), weight_decay=0.05
    )
    steps = args.epochs * max(1, len(animals.targets) // args.batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.15, cycle_momentum=False)
    if loop:
        loop.attach(optimizer, model)
    for epoch in range(args.epochs):
        if loop:
            loop.set_epoch(epoch)
        model.train()
        for images, targets in animals.train(epoch, args.batch_size):
            if loop:
                loss = loop.losses(model, images, targets, nn.functional.cross_entropy)["loss"]
            else:
                loss = rival.of_batch(images, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return rival


def fine_tuned(animals: Animals, args: argparse.Namespace, rate: float, seed: int) -> tuple[nn.Module, Loss | None]:
    """A network that was trained on what the frozen layers made of the pictures, in eval mode, and the rival's loss."""
    torch.manual_seed(seed)
    model = load_network(args.weights, len(animals.classes), dropout=0.2)
    if not args.all_layers:
        model = without_frozen_layers(model)
    rival = train(model, animals, args, rate)
    return model.eval(), rival


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; those left out are what ``assigned`` was measured with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tar and test.tar")
    parser.add_argument("--weights", required=True, help="local-dir:FOLDER of a MobileNetV2 or EfficientNet of timm")
    parser.add_argument("--cache", type=Path, required=True, help="file of frozen features, of these weights and size")
    parser.add_argument("--size", type=int, default=160, help="side of the pictures, in pixels")
    parser.add_argument("--method", default="assigned", choices=METHODS)
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[1e-3], help="learning rates of the stage, one run each"
    )
    parser.add_argument("--head-rate", type=float, help="that of the classifier; default: 4 times the other")
    parser.add_argument("--layer-decay", type=float, help="the rate of each layer, as a share of the next one's")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one run each")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--solo-weight", type=float, default=3.0)
    parser.add_argument("--filters-per-class", type=int)
    parser.add_argument("--all-layers", action="store_true", help="train all layers; give another --cache")
    parser.add_argument("--classes", nargs="+", help="only these")
    parser.add_argument("--per-class", type=int, default=0, help="train on the first so many pictures of a class")
    parser.add_argument("--hold-out", action="store_true", help="measure on 18 training pictures a class: for choosing")
    parser.add_argument("--output", type=Path, help="file of JSON lines, added to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    args, results = parse(arguments), []
    made = frozen_features(args.weights, args.data, args.size, args.cache, frozen=not args.all_layers)
    animals = choose(made, hold_out=args.hold_out, classes=args.classes, per_class=args.per_class)
    for rate, seed in product(args.rate, args.seed):
        start = time.perf_counter()
        model, rival = fine_tuned(animals, args, rate, seed)
        seconds = time.perf_counter() - start
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        found = measure(model, animals, rival and rival.owners)
        results.append(options | {"rate": rate, "seed": seed, "seconds": seconds} | found)
        print(args.method, rate, seed, {key: round(value, 4) for key, value in found.items()}, flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    return results


if __name__ == "__main__":
    main()
