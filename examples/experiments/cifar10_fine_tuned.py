"""CIFAR-10: give the filters of a trained ResNet20 owners, the last stage fine-tuned for a few epochs.

python examples/experiments/cifar10_fine_tuned.py --data cifar10.npz --weights resnet20/model.safetensors --output out
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar10 import evaluate
from cifar_resnet20 import Batches, load_cifar  # importing it registers resnet20_cifar

import timm_csg

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=".npz of encoded pictures, see load_cifar")
    parser.add_argument("--weights", required=True, help="model.safetensors of a trained resnet20_cifar")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use fewer for a quick look")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    images, targets = (part[: args.images] for part in load_cifar(args.data, "train"))
    train = Batches(images, targets, args.batch_size, is_training=True)
    test = Batches(*(part[: args.images] for part in load_cifar(args.data, "test")), 500, is_training=False)
    model = timm.create_model("resnet20_cifar").to(memory_format=torch.channels_last)
    model.load_state_dict(load_file(args.weights))
    before = evaluate(model.eval(), test)
    print("before:", json.dumps(before), flush=True)

    timm_csg.differentiate(model)
    timm_csg.freeze(model, "all-but-last-stage")
    start = time.perf_counter()
    print(timm_csg.assign_filters(model, Batches(images, targets, 500, is_training=False)), flush=True)
    groups = timm_csg.param_groups(model, lr=args.lr, head_lr=4 * args.lr, gate_lr=4 * args.lr, weight_decay=0.05)
    optimizer, rates = torch.optim.AdamW(groups), [group["lr"] for group in groups]
    steps = args.epochs * len(train)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.15, cycle_momentum=False)
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    loop.attach(optimizer, model)
    for epoch in range(args.epochs):
        loop.set_epoch(epoch)
        for inputs, labels in train:
            losses = loop.losses(model.train(), inputs, labels, torch.nn.functional.cross_entropy)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        shown = {name: round(value.item(), 3) for name, value in losses.items() if not value.ndim}
        print(f"epoch {epoch + 1}: {shown}, {time.perf_counter() - start:.0f} s", flush=True)
    result = {"recipe": "assigned, fine-tuned", "data": "CIFAR-10", "seed": args.seed, "epochs": args.epochs}
    result |= {"seconds": round(time.perf_counter() - start), **evaluate(model.eval(), test)}
    result |= {f"{name}_before": before[name] for name in ("accuracy", "mutual_information_score")}
    timm_csg.save_pretrained(model, args.output, metrics=result, class_names=CLASSES)
    (args.output / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
