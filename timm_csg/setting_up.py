"""``setup``: what a training loop needs, made in one call and in the right order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_csg import freezing
from timm_csg.assignment import find_assigned, has_assigned
from timm_csg.checks import check_fraction, nearest
from timm_csg.differentiation import differentiate
from timm_csg.groups import param_groups
from timm_csg.model import DifferentiatedModel
from timm_csg.recipes import Recipe, find_recipe, mechanism_of
from timm_csg.schedule import Alternating, Joint
from timm_csg.training import TrainingMixin

Optimizer = str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Setup(NamedTuple):
    """What ``setup`` returns.

    Attributes:
        model: The model that was given, differentiated.
        optimizer: Of all its trained parameters, the mechanism's at a rate of their own; ``step()`` projects.
        loop: Gives the losses: ``loop.losses(model, images, targets, criterion)["loss"]``.
        ema: The average of the model, to be updated with ``ema.update(model)``; None if it was not asked for.
    """

    model: DifferentiatedModel
    optimizer: torch.optim.Optimizer
    loop: TrainingMixin
    ema: ModelEmaV3 | None


def setup(
    model: nn.Module,
    num_classes: int | None = None,
    *,
    lr: float,
    loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    recipe: str = "assigned",
    optimizer: Optimizer = "adamw",
    head_lr: float | None = None,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    freeze: freezing.Freeze = "none",
    schedule: Alternating | Joint | None = None,
    ema_decay: float | None = None,
    amp_dtype: torch.dtype | None = None,
    **options: Any,
) -> Setup:
    """Differentiate a model, assign its filters, and make the optimizer and the loop that train it.

    The same as ``differentiate``, ``freeze``, ``TrainingMixin.assign_filters``, ``param_groups`` and
    ``TrainingMixin.attach`` by hand. Call it on the device of the training, before DistributedDataParallel and
    ``torch.compile``.

    Args:
        model: A timm classifier; or a differentiated one, such as ``from_pretrained`` returns, to train it further.
        num_classes: Classes to learn; None: the model's.
        lr: Learning rate of the weights.
        loader: Training pictures for the assignment of filters, best without augmentation; recipes with another
            mechanism need none.
        recipe: A name in ``timm_csg.recipes.RECIPES``: mechanism, schedule and rate of the gate.
        optimizer: A name for ``timm.optim.create_optimizer_v2``, or what makes one from parameter groups:
            ``torch.optim.AdamW``, ``functools.partial(torch.optim.SGD, momentum=0.9)``.
        head_lr: Learning rate of the classifier; 4 x ``lr`` suits fine-tuning. None: the same.
        gate_lr: Learning rate of the mechanism; None: the recipe's for this kind of optimizer.
        weight_decay: For the weights, not for the mechanism, biases and norms.
        layer_decay: timm's layer-wise learning-rate decay.
        freeze: See ``timm_csg.freeze``.
        schedule: None: the recipe's.
        ema_decay: Decay of an average of the model; None: no average.
        amp_dtype: Autocast dtype of the pass that assigns; None: no autocast.
        **options: Of the mechanism, over the recipe's.

    Returns:
        Model, optimizer, loop and average; the first is the object that was given.

    Raises:
        TypeError: If the optimizer is one that exists already, the schedule is none, or see ``differentiate``.
        ValueError: If the recipe needs a loader, or does not fit a differentiated model, or an option is wrong.

    Example:
        >>> import timm, timm_csg
        >>> loader = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
        >>> model, optimizer, loop, ema = timm_csg.setup(timm.create_model("test_resnet"), 2, lr=1e-3, loader=loader)
        >>> [group["lr"] for group in optimizer.param_groups][-1], loop.schedule
        (0.004, Joint(warmup=0, unit='epoch'))
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "setup() makes the optimizer, since the mechanism's parameters are new and want a rate of their own; pass "
            f"its class or a partial of it, optimizer=torch.optim.{type(optimizer).__name__}."
        )
    if isinstance(optimizer, str) and optimizer.lower().removeprefix("lookahead_") not in list_optimizers():
        close = nearest(optimizer, list_optimizers())
        raise ValueError(f"timm has no optimizer {optimizer!r}; timm.optim.list_optimizers() names them.{close}")
    if not (schedule is None or isinstance(schedule, (Alternating, Joint))):
        raise TypeError(f"schedule must be an Alternating or Joint of timm_csg, but is {schedule!r}.")
    if ema_decay is not None:
        check_fraction("ema_decay", ema_decay, 0.0, 1.0)
    found = find_recipe(recipe)
    ready = _differentiated(model, num_classes, recipe, options)
    freezing.freeze(ready, freeze)
    loop = TrainingMixin()
    loop.schedule = found.schedule if schedule is None else schedule
    _assign(loop, ready, loader, amp_dtype)
    groups = param_groups(
        ready,
        lr=lr,
        head_lr=head_lr,
        gate_lr=_gate_rate(found, optimizer) if gate_lr is None else gate_lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
    )
    made = create_optimizer_v2(groups, opt=optimizer, lr=lr) if isinstance(optimizer, str) else optimizer(groups)
    ema = None if ema_decay is None else ModelEmaV3(ready, decay=ema_decay)
    loop.attach(made, ready, averages=[] if ema is None else [ema])
    return Setup(ready, made, loop, ema)


def _differentiated(
    model: nn.Module, num_classes: int | None, recipe: str, options: dict[str, Any]
) -> DifferentiatedModel:
    if not isinstance(model, DifferentiatedModel):
        return differentiate(model, num_classes, recipe=recipe, **options)
    own, wanted = model.mechanism, mechanism_of(recipe, None, options)[0].name
    if own.name != wanted or num_classes not in (None, own.num_classes) or options:
        raise ValueError(
            f"the model is differentiated already (mechanism {own.name!r}, {own.num_classes} classes), which does not "
            f"fit recipe={recipe!r}, num_classes={num_classes} and the options {options}; name its own recipe and "
            "leave out the rest, or undifferentiate() it first."
        )
    return model


def _assign(
    loop: TrainingMixin,
    model: DifferentiatedModel,
    loader: Iterable[tuple[Tensor, Tensor]] | None,
    amp_dtype: torch.dtype | None,
) -> None:
    if loader is not None:
        loop.assign_filters(model, loader, amp_dtype=amp_dtype)
    elif has_assigned(model) and not find_assigned(model)[1].assigned_from_data:
        raise ValueError(
            "assigned filters are shared out by one look at the training pictures; pass loader=..., which yields "
            "(images, targets), best without augmentation."
        )


def _gate_rate(recipe: Recipe, optimizer: Optimizer) -> float:
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    return recipe.gate_rate(optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", ""))
