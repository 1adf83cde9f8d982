"""Optimizer groups: timm's, and those of the mechanism and the classifier with learning rates of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils.model import unwrap_model
from torch import nn

from timm_csg.checks import check_fraction, plain_number
from timm_csg.head import find_classifier
from timm_csg.model import DifferentiatedModel

_logger = logging.getLogger(__name__)


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    gate_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: timm's own for the model, and one for the mechanism with its own learning rate and no decay.

    The learning rate of the gate decides whether training is stable, more than any other number; the authors used 100
    times that of the weights with Adam. timm's schedulers scale all groups alike.

    Args:
        model: A differentiated model; a plain one gets timm's groups only.
        lr: Learning rate of the weights.
        gate_lr: Learning rate of the mechanism's parameters; None: the same.
        head_lr: Learning rate of the classifier, which is new where a pretrained model is fine-tuned; None: the same.
        weight_decay: For the weights, as timm does it: not for biases, norms and ``no_weight_decay()``.
        layer_decay: timm's layer-wise learning-rate decay.

    Returns:
        Groups for any optimizer, the mechanism's last, marked ``use_fallback`` for timm's hybrid optimizers (Muon would
        treat the gate as a weight matrix).

    Raises:
        ValueError: If a rate or the decay is no finite number, or negative.
    """
    lr, gate_lr, head_lr, weight_decay = map(plain_number, (lr, gate_lr, head_lr, weight_decay))
    for name, value in (("lr", lr), ("gate_lr", gate_lr), ("head_lr", head_lr), ("weight_decay", weight_decay)):
        if value is not None:
            check_fraction(name, value)
    if layer_decay is not None:
        check_fraction("layer_decay", layer_decay, 0.0, 1.0)
    inner = unwrap_model(model)
    undecayed = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(inner, weight_decay, no_weight_decay_list=undecayed)
    else:
        groups = param_groups_layer_decay(inner, weight_decay, undecayed, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale", 1.0)  # timm's schedulers start from here, and so does everyone else
    if head_lr is not None and head_lr != lr:
        groups = _with_own_rate(groups, find_classifier(inner).parameters(), head_lr)
    if not isinstance(inner, DifferentiatedModel):
        return groups
    own = [parameter for parameter in inner.mechanism.parameters() if parameter.requires_grad]
    if not own and any(True for _ in inner.mechanism.parameters()):
        _logger.warning("the mechanism is frozen and in no group; model.mechanism.requires_grad_(True) lets it learn")
    groups, _ = _split(groups, own)
    gate_group = {"params": own, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0, "use_fallback": True}
    return [*groups, gate_group] if own else groups


def _with_own_rate(groups: list[dict[str, Any]], own: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """The groups with some parameters in groups of their own, of another learning rate and the same weight decay."""
    others, owned = _split(groups, own)
    return [*others, *({**group, "lr": lr} for group in owned)]


def _split(
    groups: list[dict[str, Any]], own: Iterable[nn.Parameter]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups without some parameters, and with these alone; neither has empty groups."""
    ids = {id(parameter) for parameter in own}

    def part(is_own: bool) -> list[dict[str, Any]]:
        parts = [{**group, "params": [p for p in group["params"] if (id(p) in ids) == is_own]} for group in groups]
        return [group for group in parts if group["params"]]

    return part(False), part(True)
