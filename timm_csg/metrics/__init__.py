"""Metrics: pure functions of tensors, and the one pass over the data that makes them."""

from timm_csg.metrics.ablation import Ablation, ablate
from timm_csg.metrics.collect import Activations, accuracy, collect, pool
from timm_csg.metrics.gate import classes_per_filter, filters_per_class, gate_density, owner_agreement, owners
from timm_csg.metrics.mutual_information import (
    mutual_information,
    mutual_information_bound,
    mutual_information_score,
)

__all__ = [
    "Ablation",
    "Activations",
    "ablate",
    "accuracy",
    "classes_per_filter",
    "collect",
    "filters_per_class",
    "gate_density",
    "mutual_information",
    "mutual_information_bound",
    "mutual_information_score",
    "owner_agreement",
    "owners",
    "pool",
]
