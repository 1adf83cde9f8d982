"""Recipes: options of a mechanism, a schedule and a learning rate of the gate that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm_csg.checks import check_choice
from timm_csg.mechanisms.assigned import AssignedConfig
from timm_csg.mechanisms.base import Mechanism, MechanismConfig
from timm_csg.mechanisms.csg import CSGConfig
from timm_csg.mechanisms.icnn import ICNNConfig
from timm_csg.mechanisms.picnn import PICNNConfig
from timm_csg.mechanisms.registry import list_mechanisms, resolve_config
from timm_csg.schedule import Alternating, Joint


@dataclass(frozen=True)
class Recipe:
    """One way to train with a mechanism; ``docs/results.md`` has what each gave.

    Attributes:
        summary: One line for tables and ``--help``.
        mechanism: The options; ``differentiate(model, num_classes, recipe="...")`` takes them from here.
        schedule: For ``TrainingMixin.schedule``.
        gate_lr: Learning rate of the gate. Not relative to that of the weights: gates live in [0, 1] whatever the
            model. For SGD with a momentum of 0.9, except where the summary names another optimizer; see
            ``gate_rate``.
        separate_optimizers: Whether the paper's authors used one optimizer per path.
    """

    summary: str
    mechanism: MechanismConfig
    schedule: Alternating | Joint
    gate_lr: float = 0.1
    separate_optimizers: bool = False

    def gate_rate(self, optimizer: str) -> float:
        """Learning rate of the gate with an optimizer of this name.

        Adam and its relatives, whose steps do not shrink with the gradient, want a tenth of what SGD wants.

        Args:
            optimizer: Its name in timm, in any case.

        Returns:
            The learning rate.

        Example:
            >>> RECIPES["paper"].gate_rate("sgd"), RECIPES["paper"].gate_rate("AdamW")
            (0.1, 0.01)
        """
        has_momentum_only = optimizer.lower().startswith(("sgd", "momentum", "nesterov"))
        return self.gate_lr if has_momentum_only or self.separate_optimizers else self.gate_lr / 10


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
        mechanism=ICNNConfig(strength=20.0, part_weight=5e-4),
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


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: If there is none; the message lists them.
    """
    check_choice("recipe", name, tuple(RECIPES))
    return RECIPES[name]


def mechanism_of(
    recipe: str | None,
    mechanism: str | MechanismConfig | Sequence[str | MechanismConfig] | None,
    options: dict[str, Any],
) -> tuple[type[Mechanism], MechanismConfig]:
    """The mechanism class and config of a recipe, with options over it, or of a mechanism; ``assigned`` by default.

    Raises:
        ValueError: If both are given, or see ``resolve_config``.
        TypeError: See ``resolve_config``.

    Example:
        >>> mechanism_of("icnn", None, {"part_weight": 0.0})[1].strength
        20.0
    """
    if recipe is None:
        if isinstance(mechanism, str) and mechanism in RECIPES and mechanism not in list_mechanisms():
            raise ValueError(f"{mechanism!r} is a recipe, not a mechanism; pass recipe={mechanism!r}.")
        return resolve_config("assigned" if mechanism is None else mechanism, options)
    if mechanism is not None:
        raise ValueError(f"give a recipe or a mechanism, but got recipe={recipe!r} and mechanism={mechanism!r}.")
    config = find_recipe(recipe).mechanism
    mechanism_class, _ = resolve_config(config, {})
    return resolve_config(mechanism_class.name, config.to_dict() | options)
