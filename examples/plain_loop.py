"""One visible loop: scikit-learn's digits, a tiny timm model, and filters that belong to classes.

python examples/plain_loop.py          # filters assigned by one look at the pictures, both paths in every step
python examples/plain_loop.py --paper  # the paper's label gate, alternating: one gated epoch in three
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import timm_csg
from timm_csg import measuring, metrics


def batches(images: Tensor, targets: Tensor, size: int = 64, *, shuffle: bool = False) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images)) if shuffle else torch.arange(len(images))
    return [(images[part], targets[part]) for part in order.split(size)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paper", action="store_true", help="the paper's label gate instead of assigned filters")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--log", type=Path, help="folder for TensorBoard (pip install tensorboard); default: none")
    parser.add_argument("--output", type=Path, help="where to save the model; default: a temporary folder")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # [samples, 1, 8, 8], values 0 to 16 at first
    images, targets = F.interpolate(images, size=24, mode="bilinear"), torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(images)) % 3 == 2
    test = batches(images[held_out], targets[held_out])

    model = timm.create_model("test_resnet", num_classes=10, in_chans=1, output_stride=8)
    options = {"recipe": "assigned"}
    if args.paper:  # few steps, of which a third is gated, need a fast gate
        options = {"recipe": "paper", "gate_lr": 1.0, "sparsity_weight": 2e-2, "classes_per_filter": 1.1}
    plain = batches(images[~held_out], targets[~held_out])  # without augmentation, if there is any
    model, optimizer, loop, _ = timm_csg.setup(
        model, lr=args.lr, loader=plain, optimizer="sgd", weight_decay=5e-4, **options
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.log) if args.log else None
    for epoch in range(args.epochs):
        loop.set_epoch(epoch)
        model.train()
        for inputs, labels in batches(images[~held_out], targets[~held_out], shuffle=True):
            losses = loop.losses(model, inputs, labels, F.cross_entropy)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()  # setup() attached the loop to it: every step ends in a projection
        scheduler.step()
        numbers = {name: float(value) for name, value in losses.items() if value.ndim == 0}
        print(f"epoch {epoch + 1:2}, {loop.path:8} path: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
        if writer:
            writer.add_scalars("train", numbers, epoch + 1)
            writer.flush()

    with tempfile.TemporaryDirectory() as folder:
        model = timm_csg.from_pretrained(timm_csg.save_pretrained(model, args.output or folder))  # in eval mode
    result = evaluate(model, test)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return result


def evaluate(model: torch.nn.Module, test: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    seen = measuring.collect(model, test)
    mutual = metrics.mutual_information(seen.features, seen.targets, 10)
    return {
        "accuracy": metrics.accuracy(seen.logits, seen.targets),
        "MIS": float(metrics.mutual_information_score(mutual)),
        "density": float(metrics.gate_density(model.mechanism.class_filter_matrix())),
    }


if __name__ == "__main__":
    main()
