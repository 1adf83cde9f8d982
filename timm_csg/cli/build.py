"""From settings to the parts of a training: recipe, data config, model, optimizers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2
from torch import nn

from timm_csg.cli.settings import TrainSettings
from timm_csg.freezing import freeze
from timm_csg.mechanisms.base import resolve_config
from timm_csg.model import differentiate
from timm_csg.recipes import Recipe
from timm_csg.training import param_groups


def with_overrides(recipe: Recipe, settings: TrainSettings) -> Recipe:
    """The recipe with the mechanism options, schedule and gate learning rate of the command line."""
    mechanism = recipe.mechanism
    own = resolve_config(mechanism, {})[0].name
    name = settings.mechanism or own
    if name != own or settings.option:
        options = mechanism.to_dict() if name == own else {}
        _, mechanism = resolve_config(name, options | (settings.option or {}))
    gate_lr = settings.gate_lr
    if gate_lr is None:
        has_momentum_only = settings.opt.lower().startswith(("sgd", "momentum", "nesterov"))
        gate_lr = recipe.gate_lr if has_momentum_only or recipe.separate_optimizers else recipe.gate_lr / 10
    return replace(recipe, mechanism=mechanism, schedule=settings.schedule or recipe.schedule, gate_lr=gate_lr)


def data_config(settings: TrainSettings) -> dict[str, Any]:
    """Input size, normalisation and interpolation that the model wants, from ``timm.data.resolve_data_config``."""
    args: dict[str, Any] = {"in_chans": settings.in_chans, "img_size": settings.img_size}
    if settings.in_chans == 1:
        args |= {"mean": (0.5,), "std": (0.5,)}
    config: dict[str, Any] = resolve_data_config(args, pretrained_cfg=_model_args(settings)["pretrained_cfg"])
    return config


def _model_args(settings: TrainSettings) -> dict[str, Any]:
    requested = {"in_chans": settings.in_chans, "img_size": settings.img_size}
    try:
        args: dict[str, Any] = resolve_model_input_args(settings.model, requested, **(settings.model_kwargs or {}))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--model {settings.model}: {error}") from error
    return args


def make_model(settings: TrainSettings, num_classes: int, recipe: Recipe | None) -> nn.Module:
    """The model of the settings, differentiated if there is a recipe, and frozen as far as they say."""
    model = timm.create_model(
        **_model_args(settings), pretrained=settings.pretrained, num_classes=num_classes, drop_rate=settings.drop_rate
    )
    if recipe is not None:
        differentiate(model, num_classes, recipe.mechanism)
    freeze(model, settings.freeze)  # type: ignore[arg-type]  # one of the choices
    return model


def make_optimizers(model: nn.Module, settings: TrainSettings, recipe: Recipe | None) -> list[torch.optim.Optimizer]:
    """One optimizer, or with ``separate_optimizers`` a second one for gated steps, all at the gate's learning rate."""
    gate_lr = None if recipe is None else recipe.gate_lr
    rates = [settings.lr]
    if recipe is not None and recipe.separate_optimizers:
        rates.append(recipe.gate_lr)
    return [
        create_optimizer_v2(
            param_groups(
                model,
                lr=rate,
                gate_lr=gate_lr,
                head_lr=settings.head_lr,
                weight_decay=settings.weight_decay,
                layer_decay=settings.layer_decay,
            ),
            opt=settings.opt,
            lr=rate,
            momentum=settings.momentum,
        )
        for rate in rates
    ]


def find_amp_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """The autocast dtype; None without ``--amp``."""
    if not settings.amp:
        return None
    name = settings.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[name]
