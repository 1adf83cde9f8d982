"""``differentiate``: put a mechanism into a timm model, in place; ``undifferentiate``: take it out again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_csg.checks import whole
from timm_csg.head import check_logits
from timm_csg.mechanisms.base import MechanismConfig
from timm_csg.model import DifferentiatedModel, differentiated_class, make_mechanism, probe_in_advance
from timm_csg.recipes import mechanism_of
from timm_csg.stage import check_supported

_logger = logging.getLogger(__name__)


def differentiate(
    model: nn.Module,
    num_classes: int | None = None,
    mechanism: str | MechanismConfig | Sequence[str | MechanismConfig] | None = None,
    *,
    recipe: str | None = None,
    **options: Any,
) -> DifferentiatedModel:
    """Make a timm model interpretable by training: in place, returns the same object.

    Without targets the model computes what it computed before (not so ICNN, whose mask acts at every forward). The
    default, assigned filters, wants ``assign_filters(model, loader)`` before the first training step; after it the
    classifier uses a class's own filters only. ``mechanism="csg"`` is the paper's label gate. Do this before making the
    optimizer, wrapping in DistributedDataParallel, or compiling; ``setup`` does all of it in the right order.

    Args:
        model: Any timm classifier whose features are one tensor: 912 architectures with a map, 430 with tokens.
        num_classes: Classes to learn; if it differs from the model's, the classifier is reset, with a log line.
            None: keep.
        mechanism: Name of a mechanism, see ``list_mechanisms``, or its config; or a list of these, see ``ChainConfig``.
            None: ``"assigned"``.
        recipe: Instead of a mechanism, a name in ``timm_csg.recipes.RECIPES``: its mechanism with its options.
        **options: Fields of the mechanism's config, for example those of ``AssignedConfig``.

    Returns:
        The same model, now also a ``DifferentiatedModel`` with ``model.mechanism``.

    Raises:
        TypeError: If the model is wrapped, compiled, headless or not a timm model.
        ValueError: If it is already differentiated, its features are a list, its logits are not [batch, classes]
            (``global_pool=""``), the mechanism does not suit it (ICNN class tokens), or an option is wrong.

    Example:
        >>> import timm
        >>> model = differentiate(timm.create_model("test_resnet"), num_classes=10)
        >>> isinstance(model, timm.models.ResNet), model.mechanism.class_filter_matrix().shape
        (True, torch.Size([10, 96]))
    """
    if isinstance(model, DifferentiatedModel):
        raise ValueError(
            f"the model is already differentiated (mechanism {model.mechanism.name!r}); undifferentiate() it first."
        )
    check_supported(model)
    if hasattr(model, "mechanism"):
        raise ValueError(
            f"{type(model).__name__} already has an attribute 'mechanism'; rename it before differentiating."
        )
    mechanism_class, config = mechanism_of(recipe, mechanism, options)
    timm_model: Any = model  # has more attributes than nn.Module declares
    given = timm_model.num_classes if num_classes is None else num_classes
    classes = whole(given) or 0
    if classes < 1:
        remedy = f"a recipe is named: recipe={given!r}." if isinstance(given, str) else "pass num_classes=..."
        raise ValueError(f"num_classes must be a whole number, 1 or more, but is {given!r}; {remedy}")
    check_logits(timm_model, timm_model.num_features)
    made = make_mechanism(timm_model, classes, mechanism_class, config)
    made.check_model(timm_model)
    if classes != timm_model.num_classes:
        _logger.info("reset the classifier from %d to %d classes", timm_model.num_classes, classes)
        timm_model.reset_classifier(classes)
    timm_model.mechanism = made
    timm_model.__class__ = differentiated_class(timm_model.__class__)
    differentiated: DifferentiatedModel = timm_model
    probe_in_advance(differentiated)
    return differentiated


def undifferentiate(model: nn.Module) -> nn.Module:
    """Take the mechanism out again: in place, returns the same object with its own timm class and keys.

    Args:
        model: A differentiated model. Its logits become those of its standard path; not so for mechanisms that act at
            inference without targets.

    Returns:
        The same object.

    Raises:
        ValueError: If the model is not differentiated.

    Example:
        >>> import timm
        >>> type(undifferentiate(differentiate(timm.create_model("test_resnet")))).__name__
        'ResNet'
    """
    if not isinstance(model, DifferentiatedModel):
        raise ValueError(f"{type(model).__name__} is not differentiated, so there is nothing to undo.")
    timm_model: Any = model
    del timm_model.mechanism
    for name in ("_probed", "holds_frozen"):
        timm_model.__dict__.pop(name, None)
    timm_model.__class__ = model._plain_class
    return model
