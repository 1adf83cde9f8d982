"""What ``timm-csg evaluate`` measures only if asked: parts (landmarks), localisation (boxes), adversarial (attacks)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_csg import measuring, metrics
from timm_csg.cli.measures import Subject, number
from timm_csg.measuring import Activations, Annotations

_logger = logging.getLogger(__name__)
ATTACKS: dict[str, Any] = {"fgsm": measuring.fgsm, "pgd": measuring.pgd}
SCORES = ("iou", "ap20", "ap30")
_FEWEST = 20  # attacked images that a detector is learnt and judged on
_BATCH = 64


def measure_parts(subject: Subject) -> dict[str, Any]:
    """Location instability, and part interpretability where the file has boxes of parts."""
    annotations = read_for(subject, subject.options["landmarks"])
    peaks = measuring.collect_peaks(subject.model, subject.loader, progress=subject.tick)
    found = metrics.location_instability(peaks, annotations.points, subject.num_classes)
    subject.classes["location_instability"] = found.per_class
    subject.filters["location_instability"] = found.by_owner(subject.owners)
    result: dict[str, Any] = {
        "location_instability": number(float(found.per_class.nanmean())),
        "location_instability_own_class": number(float(subject.filters["location_instability"].nanmean())),
        "silent_filters": number(found.silent),
        "landmarks": list(annotations.point_names),
    }
    names, parts = annotations.part_boxes()
    if names:
        interpretable = measuring.part_interpretability(
            subject.model, subject.loader, parts, subject.num_classes, progress=subject.tick
        )
        own = interpretable.by_owner(subject.owners)
        subject.classes["part_interpretability"] = interpretable.per_class
        subject.filters["part_interpretability"] = own
        result |= {
            "part_interpretability": number(float(interpretable.per_class.nanmean())),
            "part_interpretability_own_class": number(float(own.nanmean())),
            "part_field_diameter": interpretable.diameter,
        }
    return result


def measure_localisation(subject: Subject) -> dict[str, Any]:
    """GradMap, ActivMap and CAM against the boxes of the objects, and what the answer "everywhere" would get."""
    boxes = read_for(subject, subject.options["boxes"]).object_boxes()
    height, width = subject.image_size
    result: dict[str, Any] = {
        "whole_image_iou": metrics.whole_image(boxes, subject.seen.targets, (height, width)).total_iou
    }
    for name, method in (
        ("gradmap", measuring.gradmap),
        ("activmap", measuring.activmap),
        ("cam", measuring.cam_localisation),
    ):
        try:
            found: metrics.Localisation = method(subject.model, subject.loader, boxes, progress=subject.tick)
        except ValueError as error:  # tokens, or a head without a weight for each class
            _logger.info("%s: %s", name, error)
            continue
        column = torch.full((subject.num_classes,), torch.nan)
        column[: len(found.iou)] = found.iou
        subject.classes[f"{name}_iou"] = column
        totals = (found.total_iou, found.total_ap20, found.total_ap30)
        result |= {f"{name}_{score}": number(value) for score, value in zip(SCORES, totals, strict=True)}
    return result


def read_for(subject: Subject, path: str | Path) -> Annotations:
    """The annotations of the subject's images, in their order and as the model sees them.

    Raises:
        ValueError: If the file cannot be read, or does not name the images.
    """
    dataset: Any = getattr(subject.loader, "dataset", None)
    transform = getattr(dataset, "transform", None)
    while dataset is not None and not hasattr(dataset, "filenames"):
        dataset = getattr(dataset, "dataset", None)
    if dataset is None:
        raise ValueError(
            f"{path}: the images of this data set have no file names, so nothing can be looked up for them."
        )
    return measuring.read_annotations(path).select(dataset.filenames()).to_input(transform)


def measure_adversarial(subject: Subject) -> dict[str, Any]:
    """Attacks on the standard path: accuracy under them, and how well they show in the filters' responses.

    An image counts as attacked where the model was right and the attack made it wrong.
    """
    images, targets = _some_images(subject)
    clean = _seen(subject, images, targets)
    right = clean.logits.argmax(dim=1) == targets
    result: dict[str, Any] = {}
    for name in subject.options["attacks"]:
        for eps in subject.options["eps"]:
            attacked_images = _attacked(subject, name, eps, images, targets)
            attacked = _seen(subject, attacked_images, targets)
            fooled = right & (attacked.logits.argmax(dim=1) != targets)
            one: dict[str, Any] = {
                "accuracy": metrics.accuracy(attacked.logits, targets),
                "fooled": int(fooled.sum()),
                "detection_errors": None,
                "disagreement_auc": None,
                "disagreement_error": None,
            }
            if int(fooled.sum()) >= _FEWEST:
                one["detection_errors"] = metrics.detection_errors(
                    clean.features[fooled], attacked.features[fooled], seed=subject.seed
                )
                if clean.gated_logits is not None and attacked.gated_logits is not None:
                    score = metrics.threshold_detection(
                        metrics.path_disagreement(clean.logits, clean.gated_logits)[fooled],
                        metrics.path_disagreement(attacked.logits, attacked.gated_logits)[fooled],
                        seed=subject.seed,
                    )
                    one |= {"disagreement_auc": score.auc, "disagreement_error": score.error}
            result[f"{name} {eps:g}/255"] = one
    return {"adversarial_images": len(targets), "adversarial": result}


def _some_images(subject: Subject) -> tuple[Tensor, Tensor]:
    """Some of the images, spread evenly over the data set, which may be sorted by class."""
    total = len(subject.seen.targets)
    wanted = set(torch.linspace(0, total - 1, min(total, subject.options["attack_images"])).long().tolist())
    kept: list[tuple[Tensor, Tensor]] = []
    start = 0
    for images, targets in subject.loader:
        rows = [index for index in range(len(targets)) if start + index in wanted]
        kept.append((images[rows], targets[rows].cpu()))
        start += len(targets)
    images, targets = (torch.cat(column) for column in zip(*kept, strict=True))
    return images, targets


def _attacked(subject: Subject, name: str, eps: float, images: Tensor, targets: Tensor) -> Tensor:
    device = next(subject.model.parameters()).device
    mean, std = subject.normalisation
    options: dict[str, Any] = {"eps": eps / 255, "mean": mean, "std": std}
    parts = []
    for number_of_batch, (batch, labels) in enumerate(zip(images.split(_BATCH), targets.split(_BATCH), strict=True)):
        seed = {} if name == "fgsm" else {"seed": 1000 * subject.seed + number_of_batch}
        parts.append(ATTACKS[name](subject.model, batch.to(device), labels.to(device), **options, **seed).cpu())
        subject.tick(len(labels))
    return torch.cat(parts)


def _seen(subject: Subject, images: Tensor, targets: Tensor) -> Activations:
    """Responses and logits; the label gate gets the predicted class, as nobody gives away the true one."""
    batches = zip(images.split(_BATCH), targets.split(_BATCH), strict=True)
    return measuring.collect(subject.model, batches, gated_by="prediction")
