"""The numbers of fine_tuning.py: do filters know the class that owns them, and does the class need them?"""

from __future__ import annotations

import torch
from frozen_animals import Animals
from ideal_owners import ideal_owners
from torch import nn

import timm_csg
from timm_csg import measuring, metrics


@torch.no_grad()
def measure(model: nn.Module, animals: Animals, owners: torch.Tensor | None = None) -> dict[str, float]:
    """Numbers of one network, over the filters that serve a class; without owners, by mutual information.

    ``*_floor`` are the same of shuffled labels: what the number is for filters that know nothing.
    """
    classes, loader, targets = len(animals.classes), animals.measured(), animals.test_targets
    seen = measuring.collect(model, loader)
    mutual = metrics.mutual_information(seen.features, targets, classes)
    result = {"accuracy": metrics.accuracy(seen.logits, targets)} | ideal_owners(seen.logits, targets, classes)
    if timm_csg.is_differentiated(model):
        owners = model.mechanism.class_filter_matrix().cpu()
        result |= {
            "gated": metrics.accuracy(seen.gated_logits, targets),
            "density": float((owners > 0.5).float().mean()),
        }
    owners = None if owners is None else owners.float()
    used = torch.ones(mutual.shape[1], dtype=torch.bool) if owners is None else (owners > 0.5).any(dim=0)
    shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    for name, labels in (("", targets), ("_floor", shuffled)):
        known = metrics.mutual_information(seen.features, labels, classes) if name else mutual
        result[f"MIS{name}"] = float(known.amax(dim=0)[used].mean())
        if owners is not None:
            result[f"agreement{name}"] = float(metrics.owner_agreement(owners[:, used], known[:, used]))
        result[f"purity{name}"] = float(metrics.purity(seen.features, labels, classes, count=20)[used].mean())
        selectivity = metrics.class_selectivity(seen.features, labels, classes)
        result[f"selectivity{name}"] = float(selectivity[used].mean())
    matrix = mutual if owners is None else owners
    is_binary = (
        bool(((matrix == 0) | (matrix == 1)).all()) and float(matrix.mean()) < 1
    )  # else each has its first class
    removal = measuring.ablate(model, loader, matrix > 0.5 if is_binary else metrics.owners(matrix), classes)
    result |= {"without": removal.own, "others": removal.others}
    return result | {"MIS_bound": float(metrics.mutual_information_bound(targets, classes).mean())}
