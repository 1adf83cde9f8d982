"""CIFAR-10 or -100 at the papers' budgets: one training, its numbers over epochs, one JSON line for each measurement.

python examples/experiments/cifar_curves.py --data cifar10.npz --budget authors --recipe paper --output curves.jsonl

Budgets: ``authors`` (development code of Liang et al.: 150 epochs), ``again`` (an independent re-implementation: 200),
``short`` (one cycle of 15 epochs, as examples/cifar10.py), ``tuned`` (5 epochs of the last stage of trained --weights).
Recipes: ``standard``, ``paper`` (the label gate in the epochs 1, 4, 7, ..., its penalty in all, projected after each
step), ``again`` (gate from 1, penalty 0.1 above one class per filter, no projection, gated epochs 2, 5, 8, ...),
``assigned``, ``picnn``; ``--option`` changes their mechanism.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar_budgets import BUDGETS, LABEL_GATES, WIDTHS, make_scheduler, measure
from cifar_resnet20 import Batches, load_cifar  # importing it registers resnet20_cifar

import timm_csg
from timm_csg import checkpoint
from timm_csg.recipes import RECIPES


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=".npz of encoded pictures, see load_cifar")
    parser.add_argument("--budget", default="authors", choices=BUDGETS)
    parser.add_argument("--recipe", default="paper", choices=["standard", *LABEL_GATES, "assigned", "picnn"])
    parser.add_argument("--option", type=json.loads, default={}, help="of the mechanism, as JSON")
    parser.add_argument("--net", default="resnet20", choices=WIDTHS)
    parser.add_argument("--weights", type=Path, help="model.safetensors of a trained resnet20_cifar, for tuned")
    parser.add_argument("--rate", type=float, help="other than the budget's")
    parser.add_argument("--batch-size", type=int, help="other than the budget's")
    parser.add_argument("--epochs", type=int, help="other than the budget's; milestones are scaled")
    parser.add_argument("--assign-at", type=int, default=0, help="epoch before which filters are assigned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="use fewer for a quick look")
    parser.add_argument("--hold-out", type=int, default=0, help="measure on so many training pictures instead")
    parser.add_argument("--test-half", type=int, choices=[1, 2], help="measure on one half of the test pictures")
    parser.add_argument("--every", type=int, default=10, help="epochs between measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file that grows")
    parser.add_argument("--save", type=Path, help="folder for the trained model")
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    images, targets = (part[: args.images].to(args.device) for part in load_cifar(args.data, "train"))
    test = tuple(part[: args.images].to(args.device) for part in load_cifar(args.data, "test"))
    if args.test_half:
        test = tuple(part.chunk(2)[args.test_half - 1] for part in test)
    if args.hold_out:
        test = images[-args.hold_out :], targets[-args.hold_out :]
        images, targets = images[: -args.hold_out], targets[: -args.hold_out]
    run = Run(args, images, targets, Batches(*test, 500, is_training=False))
    return run.train()


class Run:
    """One training: ``train`` is the loop."""

    def __init__(self, args: argparse.Namespace, images: Tensor, targets: Tensor, test: Batches) -> None:
        self.args, self.test, self.classes = args, test, int(targets.max()) + 1
        budget = BUDGETS[args.budget]
        self.budget = budget._replace(rate=args.rate or budget.rate, batch_size=args.batch_size or budget.batch_size)
        self.epochs = args.epochs or self.budget.epochs
        self.batches = Batches(images, targets, self.budget.batch_size, is_training=True)
        self.pictures = Batches(images, targets, 500, is_training=False)
        model = timm.create_model("resnet20_cifar", num_classes=self.classes, channels=WIDTHS[args.net])
        if args.weights:
            model.load_state_dict(load_file(args.weights))
        self.loop, self.is_projected, self.gated_epoch = timm_csg.TrainingMixin(), args.recipe != "standard", None
        gate_rate = None
        if args.recipe in LABEL_GATES:
            config, self.gated_epoch, self.is_projected = LABEL_GATES[args.recipe]
            model = timm_csg.differentiate(model, self.classes, replace(config, **args.option))
        elif args.recipe != "standard":
            recipe = RECIPES[args.recipe]
            model = timm_csg.differentiate(model, self.classes, recipe=args.recipe, **args.option)
            self.loop.schedule, gate_rate = recipe.schedule, recipe.gate_lr
        self.model = model.to(args.device, memory_format=torch.channels_last)
        self.optimizer = self.make_optimizer(gate_rate)
        self.scheduler = make_scheduler(self.optimizer, args.budget, self.epochs, len(self.batches))
        self.assigned_at = args.assign_at if args.recipe == "assigned" else None

    def make_optimizer(self, gate_rate: float | None) -> torch.optim.Optimizer:
        rate, decay = self.budget.rate, self.budget.weight_decay
        if self.args.budget == "tuned":
            timm_csg.freeze(self.model, "all-but-last-stage")
            rates = {"lr": rate, "head_lr": 4 * rate, "gate_lr": 4 * rate}
            return torch.optim.AdamW(timm_csg.param_groups(self.model, weight_decay=decay, **rates))
        groups = [{"params": list(self.model.parameters()), "weight_decay": decay}]  # the authors': one for all
        if gate_rate or not self.budget.milestones:
            groups = timm_csg.param_groups(self.model, lr=rate, gate_lr=gate_rate, weight_decay=decay)
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=self.budget.nesterov)

    def train(self) -> list[dict]:
        rows, start = [], time.perf_counter()
        for epoch in range(self.epochs):
            if epoch == self.assigned_at:
                timm_csg.assign_filters(self.model, self.pictures)
            self.loop.set_epoch(epoch)
            for images, targets in self.batches:
                with torch.autocast(self.args.device, dtype=torch.bfloat16):
                    loss = self.loss(epoch, images, targets)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                if self.is_projected and (self.assigned_at is None or epoch >= self.assigned_at):
                    self.model.project_()
            if (epoch + 1) % self.args.every == 0 or epoch + 1 in (1, 2, 3, self.epochs - 1, self.epochs):
                rows.append(self.row(epoch + 1, float(loss.detach()), time.perf_counter() - start))
        if self.args.save:
            if timm_csg.is_differentiated(self.model):
                timm_csg.save_pretrained(self.model, self.args.save)
            else:
                checkpoint.save_plain(self.model, self.args.save)
        return rows

    def loss(self, epoch: int, images: Tensor, targets: Tensor) -> Tensor:
        self.model.train()
        if self.gated_epoch is not None:  # the label gate as the authors' code trains it
            path = "gated" if epoch % 3 == self.gated_epoch else "standard"
            outputs = self.model(images, targets, paths=(path,))
            mechanism, logits = self.model.mechanism, getattr(outputs, path)
            penalty = mechanism.losses(logits, targets, None)["sparsity"]
            return F.cross_entropy(logits, targets) + mechanism.config.sparsity_weight * penalty
        if not timm_csg.is_differentiated(self.model) or (self.assigned_at or 0) > epoch:
            return F.cross_entropy(self.model(images), targets)
        return self.loop.losses(self.model, images, targets, F.cross_entropy)["loss"]

    @torch.no_grad()
    def row(self, epoch: int, loss: float, seconds: float) -> dict:
        names = ("budget", "recipe", "option", "net", "seed", "hold_out", "assign_at", "test_half", "images")
        result = {name: getattr(self.args, name) for name in names}
        result |= {"data": Path(self.args.data).stem, "epoch": epoch, "of": self.epochs, "loss": loss}
        result |= {"rate": self.optimizer.param_groups[0]["lr"], "seconds": round(seconds)}
        result |= measure(self.model.eval(), self.test, self.classes)
        with self.args.output.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
        return result


if __name__ == "__main__":
    main()
