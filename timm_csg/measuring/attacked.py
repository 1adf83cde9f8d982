"""Attacks on the standard path: accuracy under them, and how well they show in the filters' responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timm_csg import metrics
from timm_csg.measuring.attacks import fgsm, pgd
from timm_csg.measuring.collecting import Activations, collect
from timm_csg.measuring.subject import Subject

ATTACKS: dict[str, Any] = {"fgsm": fgsm, "pgd": pgd}
_FEWEST = 20  # attacked images that a detector is learnt and judged on
_BATCH = 64


def attacked(subject: Subject) -> dict[str, dict[str, Any]]:
    """What every attack at every strength does; an image was attacked where the model was right and became wrong."""
    images, targets = some_images(subject)
    clean = _seen(subject, images, targets)
    found = {}
    for name in subject.options["attacks"]:
        for eps in subject.options["eps"]:
            changed = _seen(subject, attack(subject, name, eps, images, targets), targets)
            found[f"{name} {eps:g}/255"] = _effect(clean, changed, targets, subject.seed)
    return found


def _effect(clean: Activations, changed: Activations, targets: Tensor, seed: int) -> dict[str, Any]:
    fooled = (clean.logits.argmax(dim=1) == targets) & (changed.logits.argmax(dim=1) != targets)
    effect: dict[str, Any] = {
        "accuracy": metrics.accuracy(changed.logits, targets),
        "fooled": int(fooled.sum()),
        "detection_errors": None,
        "disagreement_auc": None,
        "disagreement_error": None,
    }
    if int(fooled.sum()) < _FEWEST:
        return effect
    effect["detection_errors"] = metrics.detection_errors(clean.features[fooled], changed.features[fooled], seed=seed)
    if clean.gated_logits is not None and changed.gated_logits is not None:
        score = metrics.threshold_detection(
            metrics.path_disagreement(clean.logits, clean.gated_logits)[fooled],
            metrics.path_disagreement(changed.logits, changed.gated_logits)[fooled],
            seed=seed,
        )
        effect |= {"disagreement_auc": score.auc, "disagreement_error": score.error}
    return effect


def some_images(subject: Subject) -> tuple[Tensor, Tensor]:
    """Some of the images, spread evenly over the data set, which may be sorted by class."""
    total = len(subject.seen.targets)
    attacked = min(total, subject.options["attack_images"])
    wanted = set(torch.linspace(0, total - 1, attacked, device="cpu").long().tolist())
    kept: list[tuple[Tensor, Tensor]] = []
    start = 0
    for images, targets in subject.loader:
        rows = [index for index in range(len(targets)) if start + index in wanted]
        kept.append((images[rows], targets[rows].cpu()))
        start += len(targets)
    images, targets = (torch.cat(column) for column in zip(*kept, strict=True))
    return images, targets


def attack(subject: Subject, name: str, eps: float, images: Tensor, targets: Tensor) -> Tensor:
    """The images, attacked with a strength in grey levels of 255, pixels kept in the range that the loader gives."""
    device = next(subject.model.parameters()).device
    options: dict[str, Any] = {"eps": eps / 255, **normalisation(subject.loader)}
    parts = []
    for number, (batch, labels) in enumerate(zip(images.split(_BATCH), targets.split(_BATCH), strict=True)):
        seed = {} if name == "fgsm" else {"seed": 1000 * subject.seed + number}
        parts.append(ATTACKS[name](subject.model, batch.to(device), labels.to(device), **options, **seed).cpu())
        subject.tick(len(labels))
    return torch.cat(parts)


def normalisation(loader: Any) -> dict[str, list[float]]:
    """Mean and deviation that a loader normalises with; empty where it does not say."""
    transform: Any = getattr(getattr(loader, "dataset", None), "transform", None)
    for step in getattr(transform, "transforms", ()):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return {
                name: torch.as_tensor(getattr(step, name), device="cpu").flatten().tolist() for name in ("mean", "std")
            }
    return {}


def _seen(subject: Subject, images: Tensor, targets: Tensor) -> Activations:
    """Responses and logits; the label gate gets the predicted class, as nobody gives away the true one."""
    batches = zip(images.split(_BATCH), targets.split(_BATCH), strict=True)
    return collect(subject.model, batches, gated_by="prediction")
