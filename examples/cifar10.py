"""CIFAR-10 with ResNet20: standard training or a recipe of timm_csg, one visible loop.

python examples/cifar10.py --data cifar10.npz --recipe assigned --epochs 15 --output runs/assigned
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import timm
import torch
from cifar_resnet20 import Batches, load_cifar  # importing it registers resnet20_cifar

import timm_csg
from timm_csg import checkpoint, measuring, metrics
from timm_csg.recipes import RECIPES


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=".npz of encoded pictures, see load_cifar")
    parser.add_argument("--recipe", default="assigned", choices=["standard", *RECIPES])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=50_000, help="use fewer for a quick look")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    images, targets = load_cifar(args.data, "train")
    train = Batches(images[: args.train_images], targets[: args.train_images], args.batch_size, is_training=True)
    test = Batches(*load_cifar(args.data, "test"), 500, is_training=False)
    model, loop, recipe = timm.create_model("resnet20_cifar"), timm_csg.TrainingMixin(), RECIPES.get(args.recipe)
    if recipe:
        model = timm_csg.differentiate(model, mechanism=recipe.mechanism)
        loop.schedule = recipe.schedule
    model = model.to(memory_format=torch.channels_last).train()
    groups = timm_csg.param_groups(model, lr=args.lr, gate_lr=recipe and recipe.gate_lr, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    steps, rates = args.epochs * len(train), [group["lr"] for group in groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.25, cycle_momentum=False)
    if recipe:
        loop.attach(optimizer, model)  # projects the mechanism after every optimizer.step()
        loop.assign_filters(model, Batches(train.images, train.targets, 500, is_training=False))
    criterion, start = torch.nn.functional.cross_entropy, time.perf_counter()
    for epoch in range(args.epochs):
        loop.set_epoch(epoch)
        for images, targets in train:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = loop.losses(model, images, targets, criterion) if recipe else {}
                loss = losses["loss"] if recipe else criterion(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    result = {"recipe": args.recipe, "data": "CIFAR-10", "seed": args.seed, "epochs": args.epochs}
    result |= {"seconds": round(time.perf_counter() - start), **evaluate(model.eval(), test)}
    if recipe:
        timm_csg.save_pretrained(model, args.output, metrics=result)
    else:
        checkpoint.save_plain(model, args.output)
    (args.output / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return result


def evaluate(model: torch.nn.Module, test: Batches) -> dict:
    """What docs/results.md reports, all on the test images and the ungated features."""
    seen = measuring.collect(model, test)
    mutual = metrics.mutual_information(seen.features, seen.targets, 10)
    gate = model.mechanism.class_filter_matrix() if timm_csg.is_differentiated(model) else None
    removed = measuring.ablate(model, test, metrics.owners(mutual if gate is None else gate), 10)
    result = {"accuracy": metrics.accuracy(seen.logits, seen.targets)}
    result["mutual_information_score"] = float(metrics.mutual_information_score(mutual))
    result |= {"class_without_its_filters": removed.own, "other_classes": removed.others}
    if gate is not None:
        result["gated_accuracy"] = metrics.accuracy(seen.gated_logits, seen.targets)
        result["gate_density"] = float(metrics.gate_density(gate))
        result["owner_agreement"] = float(metrics.owner_agreement(gate, mutual))
    return result


if __name__ == "__main__":
    main()
