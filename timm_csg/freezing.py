"""Freeze all of a model but its last stage, or but its classifier, as fine-tuning on few pictures wants it."""

from __future__ import annotations

from typing import Any, Literal

from timm.models import group_parameters
from torch import nn

from timm_csg.model import DifferentiatedModel, hold_frozen

Freeze = Literal["none", "all-but-last-stage", "backbone"]
FREEZE: tuple[Freeze, ...] = ("none", "all-but-last-stage", "backbone")


def freeze(model: nn.Module, what: Freeze = "all-but-last-stage") -> list[str]:
    """Freeze parameters in place; a mechanism stays trainable.

    What a stage is, is timm's own grouping of layers (``group_matcher(coarse=True)``), from which layer-wise rates come
    too: the last group holds the classifier, the one before it the last stage. Batch norms that are frozen have to stay
    in eval mode: a differentiated model's ``train()`` sees to that, for others call ``hold_frozen`` after ``train()``.

    Args:
        model: A timm classifier, plain or differentiated. Do this before making the optimizer.
        what: ``"none"``: nothing; ``"all-but-last-stage"``: all layers before the last stage; ``"backbone"``: all but
            the classifier.

    Returns:
        Names of the parameters that are trained.

    Raises:
        ValueError: If ``what`` is none of the three, or timm does not know the stages of this model.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet")
        >>> sorted({name.split(".")[0] for name in freeze(model)})
        ['fc', 'layer4']
    """
    if what not in FREEZE:
        raise ValueError(f"freeze takes one of {', '.join(map(repr, FREEZE))}, but found {what!r}.")
    if what != "none":
        if not hasattr(model, "group_matcher"):
            raise ValueError(f"timm does not know the stages of {type(model).__name__}; freeze layers by hand.")
        timm_model: Any = model
        groups = group_parameters(model, timm_model.group_matcher(coarse=True))
        # timm numbers groups from the stem on; parameters that it cannot place come last, with the classifier.
        trained = sorted(groups)[-2:] if what == "all-but-last-stage" else sorted(groups)[-1:]
        kept = {name for number in trained for name in groups[number]}
        for name, parameter in model.named_parameters():
            if name not in kept and not name.startswith("mechanism."):
                parameter.requires_grad_(False)
        if isinstance(model, DifferentiatedModel):
            model.holds_frozen = True
        hold_frozen(model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
