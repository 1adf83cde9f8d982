"""The class-specific gate as its authors' released code trains it, on six kinds of animals, standard training beside.

python examples/experiments/released_code.py --data animalparts --weights local-dir:mobilenetv2 --cache squares.pt

Each animal is cut out as a square of 128 pixels; two Adams, 1e-5 for standard epochs and 1e-3 for gated ones, one
epoch in three after ten; 151 epochs. Here only the last stage and the classifier are trained, on what the frozen layers
make of ten random crops of every picture. *standard* is the authors' baseline, 1e-5 in every epoch; *two-rates* has no
gate, but both Adams, as the gated network has; *assigned* are assigned filters with both. The seed draws nine tenths of
the training pictures, the classifier's first weights and the order. One line of JSON each is added to --output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from animal_pictures import nine_tenths
from animal_training import behind_frozen_layers
from frozen_animals import Animals, load_network
from owner_numbers import measure
from released_pictures import SIZE, animals, as_animals, normalised
from torch import nn

import timm_csg
from timm_csg import measuring, metrics
from timm_csg.recipes import RECIPES

METHODS = ["standard", "two-rates", "released", "assigned"]
MILESTONES = (0.4, 0.6, 0.8)  # of the epochs; counted by each Adam in its own epochs, so the second never gets there


def train(model: nn.Module, made: Animals, args: argparse.Namespace, method: str) -> None:
    """Train in place: the authors' two optimizers and their schedule."""
    recipe, loop = RECIPES["released"], timm_csg.TrainingMixin()
    differentiated = timm_csg.is_differentiated(model)
    own = list(model.mechanism.parameters()) if differentiated else []
    weights = [weight for weight in model.parameters() if weight.requires_grad and all(weight is not o for o in own)]
    slow, fast = torch.optim.Adam(weights, lr=1e-5), torch.optim.Adam([*weights, *own], lr=recipe.gate_lr)
    marks = [round(share * args.epochs) for share in MILESTONES]
    schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizer, marks) for optimizer in (slow, fast)]
    if differentiated:
        loop.schedule = RECIPES[method].schedule
        loop.assign_filters(model, made.plain())
        loop.attach([slow, fast], model)
    for epoch in range(args.epochs):
        loop.set_epoch(epoch)
        model.train()
        is_fast = method != "standard" and recipe.schedule.path(epoch, 0) == "gated"
        optimizer, scheduler = (fast, schedulers[1]) if is_fast else (slow, schedulers[0])
        for images, targets in made.train(epoch, args.batch_size):
            criterion = nn.functional.cross_entropy
            losses = loop.losses(model, images, targets, criterion) if differentiated else {}
            loss = losses["loss"] if differentiated else criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    model.eval()


def localise(model: nn.Module, made: dict, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Avg-IoU, AP20 and AP30 over all test pictures, by CAM, ActivMap and GradMap."""
    images, targets, boxes = normalised(model, made["test_pictures"]), made["test_y"], made["test_boxes"]
    loader = list(zip(images.split(60), targets.split(60), strict=True))
    few = torch.cat([(targets == index).nonzero()[: args.gradmap_images, 0] for index in targets.unique()])
    found = {
        "whole": metrics.whole_image(boxes, targets, (SIZE, SIZE)),
        "cam": measuring.cam_localisation(model, loader, boxes),
        "activmap": measuring.activmap(model, loader, boxes),
        "activmap_positive": measuring.activmap(model, loader, boxes, positive_only=True),
    }
    if len(few):
        found["gradmap"] = measuring.gradmap(model, [(images[few], targets[few])], boxes[few])
    return {name: {"iou": one.total_iou, "ap20": one.total_ap20, "ap30": one.total_ap30} for name, one in found.items()}


def run(made: dict, args: argparse.Namespace, method: str, seed: int) -> dict:
    """Train and measure one network."""
    torch.manual_seed(seed)
    chosen = as_animals(made, nine_tenths(made["train_y"], seed))
    model = load_network(args.weights, len(chosen.classes))
    nn.init.normal_(model.classifier.weight, std=0.01)
    if method in RECIPES:
        timm_csg.differentiate(model, recipe=method)
    for parameter in [*model.conv_stem.parameters(), *model.bn1.parameters(), *model.blocks[:-1].parameters()]:
        parameter.requires_grad_(False)
    with behind_frozen_layers(model):
        train(model, chosen, args, method)
        owners = model.mechanism.class_filter_matrix() if timm_csg.is_differentiated(model) else None
        found = {"method": method, "seed": seed, **measure(model, chosen, owners)}
    found |= {} if owners is None else {"gate_density": float(metrics.gate_density(owners))}
    return found | {"localisation": localise(model, made, args)}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tar, test.tar and annotations.csv")
    parser.add_argument("--weights", required=True, help="local-dir:FOLDER of a MobileNetV2 or EfficientNet of timm")
    parser.add_argument("--cache", type=Path, required=True, help="file of frozen features; one for each network")
    parser.add_argument("--classes", nargs="+", default=["bird", "cat", "dog", "antelope", "horse", "sheep"])
    parser.add_argument("--method", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=151)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--gradmap-images", type=int, default=10, help="of each class")
    parser.add_argument("--output", type=Path, help="file of JSON lines, added to")
    args = parser.parse_args(arguments)
    made, results = animals(args.weights, args.data, args.classes, args.cache), []
    for seed in args.seed:
        for method in args.method:
            results.append(run(made, args, method, seed))
            print(json.dumps(results[-1]), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    options = {"epochs": args.epochs, "batch_size": args.batch_size}
                    file.write(json.dumps(options | results[-1]) + "\n")
    return results


if __name__ == "__main__":
    main()
