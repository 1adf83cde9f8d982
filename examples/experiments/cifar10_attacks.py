"""Attacks on CIFAR-10 networks and how well they are noticed; for cifar10_metrics.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

import timm_csg
from timm_csg import measuring, metrics

ATTACKS = {
    "FGSM 2": (measuring.fgsm, 2),
    "FGSM 8": (measuring.fgsm, 8),
    "PGD 1": (measuring.pgd, 1),
    "PGD 4": (measuring.pgd, 4),
}


def measure_attacks(model: nn.Module, test: Iterable) -> dict[str, float]:
    """Accuracy under each attack (strength in grey levels of 255), and error rates of detectors on fooled images."""
    result: dict[str, float] = {}
    clean = measuring.collect(model, test, gated_by="prediction")
    for name, (attack, levels) in ATTACKS.items():
        attacked = ((attack(model, images, targets, eps=levels / 255), targets) for images, targets in test)
        seen = measuring.collect(model, attacked, gated_by="prediction")
        fooled = (clean.logits.argmax(1) == clean.targets) & (seen.logits.argmax(1) != seen.targets)
        result |= {
            f"{name}: accuracy": metrics.accuracy(seen.logits, seen.targets),
            f"{name}: fooled": int(fooled.sum()),
        }
        if fooled.sum() < 20:
            continue  # too few to learn from
        errors = metrics.detection_errors(clean.features[fooled], seen.features[fooled])
        result |= {f"{name}: error, {classifier}": error for classifier, error in errors.items()}
        scores = {
            "doubt": [1 - part.logits.softmax(1).amax(1) for part in (clean, seen)]
        }  # needs no gate: the baseline
        if timm_csg.is_differentiated(model):
            scores["paths"] = [metrics.path_disagreement(part.logits, part.gated_logits) for part in (clean, seen)]
        for score, (of_clean, of_attacked) in scores.items():
            detection = metrics.threshold_detection(of_clean[fooled], of_attacked[fooled])
            result |= {f"{name}: AUC, {score}": detection.auc, f"{name}: error, {score}": detection.error}
    return result


def gate_numbers(gate: torch.Tensor, mutual: torch.Tensor) -> dict[str, float]:
    """What the gate itself says."""
    counts = metrics.gate_counts(gate)
    return {
        "owner agrees": float(metrics.owner_agreement(gate, mutual)),
        "gate density": float(metrics.gate_density(gate)),
        "binarity": float(metrics.binarity(gate)),
        "owned entries": int(counts.owned),
        "shared entries": int(counts.shared),
        "filters with one class": int(counts.exclusive),
    }
