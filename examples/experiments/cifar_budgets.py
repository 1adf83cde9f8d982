"""Budgets and numbers of cifar_curves.py: what the papers' code trains for how long, and what is measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar_resnet20 import Batches
from ideal_owners import ideal_owners

import timm_csg
from timm_csg import measuring, metrics


class Budget(NamedTuple):
    """How long and how fast; ``milestones`` are epochs at which the rate falls to a tenth, none: one cycle."""

    epochs: int
    batch_size: int
    rate: float
    weight_decay: float
    nesterov: bool
    milestones: tuple[int, ...] = ()


BUDGETS = {
    "authors": Budget(150, 256, 0.1, 1e-4, True, (60, 90, 120)),
    "again": Budget(200, 128, 0.1, 1e-4, False, (100, 150)),
    "short": Budget(15, 128, 0.2, 5e-4, True),
    "tuned": Budget(5, 128, 1e-3, 0.05, False),
}
WIDTHS = {"resnet20": (16, 32, 64), "wide": (64, 128, 256)}
LABEL_GATES = {  # mechanism, gated epochs (epoch % 3), whether the gate is projected
    "paper": (timm_csg.CSGConfig(), 1, True),
    "again": (timm_csg.CSGConfig(sparsity_weight=0.1, classes_per_filter=1.0, initial_gate=1.0), 2, False),
}


def make_scheduler(
    optimizer: torch.optim.Optimizer, name: str, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Of a budget, for so many steps in an epoch; stepped after every batch."""
    budget, rates = BUDGETS[name], [group["lr"] for group in optimizer.param_groups]
    if budget.milestones:
        milestones = [epoch * epochs * steps // budget.epochs for epoch in budget.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    warm = 0.15 if name == "tuned" else 0.25
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs * steps, pct_start=warm, cycle_momentum=False)


def measure(model: nn.Module, test: Batches, classes: int) -> dict:
    """Numbers of the test pictures; without a gate, by mutual information."""
    seen = measuring.collect(model, test)
    targets = seen.targets
    mutual = metrics.mutual_information(seen.features.to(test.images.device), targets, classes).cpu()
    result = {"accuracy": metrics.accuracy(seen.logits, targets), "MIS": float(mutual.amax(dim=0).mean())}
    result |= ideal_owners(seen.logits.cpu(), targets.cpu(), classes)
    result["purity"] = float(metrics.purity(seen.features, targets, classes, count=20).mean())
    result["selectivity"] = float(metrics.class_selectivity(seen.features, targets, classes).mean())
    owners = metrics.owners(mutual)
    if timm_csg.is_differentiated(model):
        gate = model.mechanism.class_filter_matrix().cpu()
        is_binary = bool(((gate == 0) | (gate == 1)).all())
        owners = gate > 0.5 if is_binary and float(gate.mean()) < 1 else metrics.owners(gate)
        result |= {
            "gated": metrics.accuracy(seen.gated_logits, targets),
            "density": float(metrics.gate_density(gate)),
            "classes_per_filter": float((gate > 0.5).float().sum(dim=0).mean()),
            "agreement": float(metrics.owner_agreement(gate, mutual)),
            "weight_on_owned": float(model.fc.weight[gate.to(model.fc.weight.device) > 0.5].abs().mean()),
            "weight_on_others": float(model.fc.weight[gate.to(model.fc.weight.device) <= 0.5].abs().mean()),
        }
    removed = measuring.ablate(model, test, owners, classes)
    return result | {"without": removed.own, "others": removed.others}
