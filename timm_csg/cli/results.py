"""What the trainings of a run gave: measured once at the end, written as JSON, CSV and figures."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from timm_csg import measuring, metrics
from timm_csg.checkpoint import replacing
from timm_csg.cli.data import Data
from timm_csg.cli.engine import Training
from timm_csg.model import is_differentiated

_logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What ``measure`` returns.

    Attributes:
        values: JSON-able, for ``metrics.json``.
        mutual: Mutual information [classes, filters].
        gate: The mechanism's class-filter matrix; None where there is none.
    """

    values: dict[str, Any]
    mutual: torch.Tensor
    gate: torch.Tensor | None


def measure(training: Training, data: Data, standard_accuracy: float | None = None) -> Measured:
    """The metrics of one trained model on the validation images.

    Args:
        training: At its end.
        data: Its data.
        standard_accuracy: Of standard training in the same run, for the verdict; None: not known.

    Returns:
        Its values: what was trained, accuracies, MIS and its bound in nats, density, agreement of owners, ablation,
        whether the owners can be trusted, seconds; and the matrices to draw.
    """
    model = training.eval_model
    seen = measuring.collect(model, data.validation, amp_dtype=training.amp_dtype)
    mutual = metrics.mutual_information(seen.features, seen.targets, data.num_classes)
    gate = model.mechanism.class_filter_matrix() if is_differentiated(model) else None
    matrix = mutual if gate is None else gate.cpu()
    owned = metrics.owned_filters(matrix)
    ablation = measuring.ablate(model, data.validation, owned, data.num_classes, amp_dtype=training.amp_dtype)
    settings = training.settings
    result: dict[str, Any] = {
        "recipe": training.name,
        "data": settings.data_name,
        "model": settings.model.rpartition("/")[2],
        "seed": settings.seed,
        "epochs": len(training.history),
        "accuracy": metrics.accuracy(seen.logits, seen.targets),
        "gated_accuracy": None,
        "gated_accuracy_uses_labels": None,
        "mutual_information_score": float(metrics.mutual_information_score(mutual)),
        "mutual_information_bound": float(metrics.mutual_information_bound(seen.targets, data.num_classes).max()),
        "gate_density": None,
        "owner_agreement": None,
        "class_without_its_filters": ablation.own,
        "other_classes": ablation.others,
        "filter_owners_by": "mutual information" if gate is None else "gate",
        "filters_per_class": owned.sum(dim=1).tolist(),
        "seconds": round(sum(row["seconds"] for row in training.history), 1),
    }
    if is_differentiated(model) and gate is not None and seen.gated_logits is not None:
        result |= {
            "gated_accuracy": metrics.accuracy(seen.gated_logits, seen.targets),
            "gated_accuracy_uses_labels": model.mechanism.needs_targets,
            "gate_density": float(metrics.gate_density(gate)),
            "owner_agreement": float(metrics.owner_agreement(matrix, mutual)),
        }
        judged = metrics.verdict(
            matrix,
            seen.features,
            seen.targets,
            accuracy=result["accuracy"],
            removal=ablation,
            standard_accuracy=standard_accuracy,
        )
        result |= judged.as_metrics()
    return Measured(result, mutual, None if gate is None else matrix)


def draw(measured: Measured, class_names: list[str], figures: Path) -> None:
    """The figures of one training, if matplotlib is there."""
    name, model, data = (measured.values[key] for key in ("recipe", "model", "data"))
    title = f"{name} ({model}, {data})"
    mutual = figures / f"mutual_information_{name}.png"
    save_matrix_figure(mutual, measured.mutual, class_names, "mutual information (nats)", title)
    if measured.gate is not None:
        save_matrix_figure(figures / f"gate_{name}.png", measured.gate, class_names, "gate", title)


def save_matrix_figure(path: Path, matrix: torch.Tensor, class_names: list[str], label: str, title: str) -> None:
    """Write the picture of a class-filter matrix, whole or not at all; without matplotlib say so in the log."""
    from timm_csg.plots import class_filter_figure

    try:
        figure = class_filter_figure(matrix, class_names, title=title, label=label)
    except ImportError as error:
        _logger.warning("no figures: %s", error)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write_log(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the epochs of all trainings as one CSV file, whole or not at all."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
