"""Recipes: options of a mechanism, a schedule and a learning rate of the gate that belong together."""

from __future__ import annotations

from dataclasses import dataclass

from timm_csg.mechanisms.assigned import AssignedConfig
from timm_csg.mechanisms.base import MechanismConfig
from timm_csg.mechanisms.csg import CSGConfig
from timm_csg.mechanisms.icnn import ICNNConfig
from timm_csg.mechanisms.picnn import PICNNConfig
from timm_csg.schedule import Alternating, Joint


@dataclass(frozen=True)
class Recipe:
    """One way to train with a mechanism; ``docs/results.md`` has what each gave.

    Attributes:
        summary: One line for tables and ``--help``.
        mechanism: The options, for ``differentiate(model, num_classes, recipe.mechanism)``.
        schedule: For ``TrainingMixin.schedule``.
        gate_lr: Learning rate of the gate. Not relative to that of the weights: gates live in [0, 1] whatever the
            model. For SGD with a momentum of 0.9, except where the summary names another optimizer; Adam and its
            relatives, whose steps do not shrink with the gradient, want a tenth.
        separate_optimizers: Whether the paper's authors used one optimizer per path.
    """

    summary: str
    mechanism: MechanismConfig
    schedule: Alternating | Joint
    gate_lr: float = 0.1
    separate_optimizers: bool = False


RECIPES = {
    "released": Recipe(
        summary="the authors' released code: fine-tuning, 1 gated epoch in 3 after 10, Adam 1e-5 and 1e-3",
        mechanism=CSGConfig(),
        schedule=Alternating(period=3, gated=1, warmup=10),
        gate_lr=1e-3,
        separate_optimizers=True,
    ),
    "paper": Recipe(
        summary="the paper's label gate, alternating from scratch: 1 gated epoch in 3; wants 100 epochs and more",
        mechanism=CSGConfig(classes_per_filter=1.0),
        schedule=Alternating(period=3, gated=1),
    ),
    "joint": Recipe(
        summary="the paper's label gate, both paths in every step",
        mechanism=CSGConfig(),
        schedule=Joint(),
    ),
    "assigned": Recipe(
        summary="ours: filters assigned to classes in one pass over the images, each trained to know its class alone",
        mechanism=AssignedConfig(),
        schedule=Joint(),
        gate_lr=0.04,
    ),
    "icnn": Recipe(
        summary="part filters: mask at every forward, part loss in every step; fine-tune a pretrained model",
        mechanism=ICNNConfig(strength=20.0, part_weight=1e-3),
        schedule=Joint(),
        gate_lr=1e-2,
    ),
    "picnn": Recipe(
        summary="filter-class probabilities, and a second pathway through the filters drawn for the predicted class",
        mechanism=PICNNConfig(),
        schedule=Joint(),
        gate_lr=0.1,
    ),
}
"""By name: ``released``, ``paper``, ``joint``, ``assigned``, ``icnn``, ``picnn``."""
