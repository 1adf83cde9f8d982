"""Parts and owners on one network: part filters (ICNN) and assigned filters, each alone, together, and neither.

python examples/experiments/parts_and_owners.py --data animalparts --weights local-dir:mobilenetv2 --cache frozen.pt

Trains the last stage on whole animal pictures and reports accuracy, whether filters know their owner, and how steadily
they keep their distance to head and legs. --figure draws, for some classes, an own filter on the head and one on the
legs. One line of JSON for each method and seed is added to --output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from animal_pictures import nine_tenths
from frozen_animals import Animals, choose, frozen_features, load_network, without_frozen_layers
from owner_numbers import measure
from part_and_owner_figure import draw_parts
from part_steadiness import Marks, places, steadiness
from torch import nn

import timm_csg
from timm_csg.measuring.fields import receptive_field

METHODS = ["standard", "icnn", "assigned", "both"]


def mechanisms(args: argparse.Namespace, method: str) -> list:
    """Configs of a method's mechanisms, in order."""
    parts = timm_csg.ICNNConfig(strength=args.strength, part_weight=args.part_weight, extra_conv=args.extra_conv)
    owners = timm_csg.AssignedConfig(filters_per_class=args.filters_per_class)
    return {"standard": [], "icnn": [parts], "assigned": [owners], "both": [parts, owners]}[method]


def train(model: nn.Module, animals: Animals, args: argparse.Namespace, method: str) -> None:
    """Train in place: AdamW, one cycle, float32."""
    loop, wanted = timm_csg.TrainingMixin(), mechanisms(args, method)
    if wanted:
        timm_csg.differentiate(model, len(animals.classes), wanted if len(wanted) > 1 else wanted[0])
        model.to(args.device)
        loop.schedule = timm_csg.Joint()
        loop.assign_filters(model, animals.plain())
    stage, head, own = [], [], []
    for name, parameter in model.named_parameters():
        (head if name.startswith("classifier") else own if "mechanism" in name else stage).append(parameter)
    groups = [{"params": stage, "lr": args.rate}, {"params": head, "lr": 4 * args.rate}]
    groups += [{"params": own, "lr": 4 * args.rate, "weight_decay": 0.0}] if own else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    steps, rates = args.epochs * max(1, len(animals.targets) // args.batch_size), [group["lr"] for group in groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.15, cycle_momentum=False)
    if wanted:
        loop.attach(optimizer, model)
    for epoch in range(args.epochs):
        loop.set_epoch(epoch)
        model.train()
        for images, targets in animals.train(epoch, args.batch_size):
            criterion = nn.functional.cross_entropy
            losses = loop.losses(model, images, targets, criterion) if wanted else {}
            loss = losses["loss"] if wanted else criterion(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()


def run(made: dict, marks: Marks, args: argparse.Namespace, method: str, seed: int) -> dict:
    """Train and measure one network; the seed draws its training pictures, its classifier, crops and their order."""
    torch.manual_seed(seed)
    animals, size = choose(made), args.size
    rows = nine_tenths(animals.targets, seed)
    crops = [animals.crops[index][rows].to(args.device) for index in torch.randperm(len(animals.crops))]
    targets = animals.targets[rows].to(args.device)
    animals = animals._replace(whole=animals.whole[rows].to(args.device), crops=crops, targets=targets)
    network = load_network(args.weights, len(animals.classes), dropout=0.2, output_stride=args.stride)
    nn.init.normal_(network.classifier.weight, std=0.01)
    field = receptive_field(network, size)
    model = without_frozen_layers(network).to(args.device)
    train(model, animals, args, method)
    has_owners = method in ("assigned", "both")
    owners = model.mechanism.class_filter_matrix().cpu() if has_owners else None
    peaks, means = places(model, animals.test.to(args.device), animals.test_targets, field, size)
    found = {"method": method, "seed": seed, **measure(model, animals)}
    found |= {f"instability_{name}": value for name, value in steadiness(peaks, means, marks.test, owners).items()}
    if args.figure and method == "both":
        seen = places(model, made["train"].to(args.device), made["train_y"], field, size)
        beta = model.mechanism.members[0].config.beta
        drawn = draw_parts(args.figure, args.data, size, beta, animals.classes, owners, (seen, (peaks, means)), marks)
        found["figure"] = drawn
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tar, test.tar and annotations.csv")
    parser.add_argument("--weights", required=True, help="local-dir:FOLDER of a MobileNetV2 or EfficientNet of timm")
    parser.add_argument("--cache", type=Path, required=True, help="file of frozen features; one for each --stride")
    parser.add_argument("--method", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the stage")
    parser.add_argument("--size", type=int, default=160, help="side of the pictures, in pixels")
    parser.add_argument("--stride", type=int, default=32, choices=[16, 32], help="16: the last stages are dilated")
    parser.add_argument("--strength", type=float, default=20.0)
    parser.add_argument("--part-weight", type=float, default=1e-3)
    parser.add_argument("--extra-conv", default="none", choices=["none", "depthwise", "full"])
    parser.add_argument("--filters-per-class", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="of the first seed's network with both")
    parser.add_argument("--output", type=Path, help="file of JSON lines, added to")
    args = parser.parse_args(arguments)
    made = frozen_features(
        args.weights, args.data, args.size, args.cache, output_stride=args.stride, device=args.device
    )
    marks, results = Marks.read(args.data / "annotations.csv", made, args.size), []
    for seed in args.seed:
        for method in args.method:
            results.append(run(made, marks, args, method, seed))
            args.figure = None if results[-1].get("figure") else args.figure
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in results[-1].items()})
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
                with args.output.open("a") as file:
                    file.write(json.dumps(options | results[-1]) + "\n")
    return results


if __name__ == "__main__":
    main()
