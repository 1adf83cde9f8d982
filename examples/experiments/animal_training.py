"""How animal_parts.py trains: the last stage and the classifier, on what the frozen layers made of the pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from animal_pictures import Pictures, as_stored
from torch import nn

import timm_csg
from timm_csg.assignment import has_assigned
from timm_csg.recipes import Recipe


@contextmanager
def behind_frozen_layers(model: nn.Module) -> Iterator[None]:
    """Inside, a network takes what its frozen layers make of pictures; afterwards pictures again."""
    config, model.pretrained_cfg = model.pretrained_cfg, {}  # what it says of pictures does not hold
    model.forward_features = lambda cached: model.bn2(model.conv_head(model.blocks[-1](cached)))
    try:
        yield
    finally:
        del model.forward_features
        model.pretrained_cfg = config


def train_last_stage(
    model: nn.Module,
    train: Pictures,
    recipe: Recipe | None,
    *,
    epochs: int,
    batch_size: int,
    mechanism_rate: float | None = None,
) -> None:
    """Train in place, with AdamW, one cycle and bfloat16; without a recipe as any classifier."""
    stage = [*model.blocks[6].parameters(), *model.conv_head.parameters(), *model.bn2.parameters()]
    groups = [{"params": stage, "lr": 2e-4}, {"params": list(model.classifier.parameters()), "lr": 2e-3}]
    loop, criterion = timm_csg.TrainingMixin(), nn.functional.cross_entropy
    if recipe and has_assigned(model):
        whole = zip(as_stored(train.whole).split(64), train.targets.split(64), strict=True)
        timm_csg.assign_filters(model, whole, amp_dtype=torch.bfloat16)
    if recipe and list(model.mechanism.parameters()):
        rate = recipe.gate_lr / 3 if mechanism_rate is None else mechanism_rate
        groups.append({"params": list(model.mechanism.parameters()), "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    steps, rates = epochs * (len(train.targets) // batch_size), [group["lr"] for group in groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.15, cycle_momentum=False)
    if recipe:
        loop.schedule = timm_csg.Joint()
        loop.attach(optimizer, model)
    start = time.perf_counter()
    for epoch in range(epochs):
        loop.set_epoch(epoch)
        model.train()
        for cached, targets in train.epoch(epoch, batch_size):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = loop.losses(model, cached, targets, criterion) if recipe else {}
                loss = losses["loss"] if recipe else criterion(model(cached), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        shown = {name: round(value.item(), 3) for name, value in (losses or {"loss": loss}).items() if not value.ndim}
        print(f"epoch {epoch + 1}: {shown}, {time.perf_counter() - start:.0f} s", flush=True)
