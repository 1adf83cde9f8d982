"""What a timm model's head does with the features: one response per filter and a linear layer, or more."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.mechanisms.base import HeadKind
from timm_csg.stage import is_channels_last

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


class HeadTraits(NamedTuple):
    """What ``probe_head`` found; both are those of ``mechanisms.Head``."""

    kind: HeadKind
    pools_by_mean: bool = False


def probe_head(model: Any, num_filters: int) -> HeadKind:
    """Find out, on a small random map, what kind of head a plain model has; modes and random state stay as they are.

    Args:
        model: A plain timm classifier.
        num_filters: Width of its features.

    Returns:
        ``"linear"``, ``"normed"``, ``"pooled"`` or ``"map"``, see ``mechanisms.Head``; ``"map"``, which is right for
        every head, also where nothing can be computed yet because the weights are on the meta device.

    Example:
        >>> import timm
        >>> probe_head(timm.create_model("test_resnet"), 96), probe_head(timm.create_model("test_convnext"), 64)
        ('linear', 'normed')
    """
    return probe_traits(model, num_filters).kind


@torch.no_grad()
def probe_traits(model: Any, num_filters: int) -> HeadTraits:
    """``probe_head``, and whether the head takes the mean over positions."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if parameter.device.type == "meta":
        return HeadTraits("map")
    generator = torch.Generator().manual_seed(0)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for shape in (
            (1, 7, 7, num_filters) if is_channels_last(model) else (1, num_filters, 7, 7),
            (1, 16, num_filters),
        ):
            features = torch.rand(shape, generator=generator).to(parameter)
            channels_last = len(shape) == 3 or is_channels_last(model)
            row = torch.rand(num_filters, generator=generator).to(parameter)
            try:
                return _traits(model, features, row if channels_last else row[:, None, None], row)
            except (RuntimeError, ValueError, IndexError):
                continue  # a head for tokens refuses a map, and the other way round
    finally:
        for module, training in modes.items():
            module.training = training
    return HeadTraits("map")


def _traits(model: Any, features: Tensor, row_of_map: Tensor, row: Tensor) -> HeadTraits:
    tolerance = 1e-3 if features.dtype in (torch.float32, torch.float64) else 5e-2

    def same(found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).abs().max() <= tolerance * (expected.abs().max() + 1e-6))

    pooled = model.forward_head(features, pre_logits=True).flatten(1)
    classifier = find_classifier(model)
    called: list[nn.Module] = []
    with nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: called.append(module)):
        logits = model.forward_head(features).flatten(1)
    # A fresh batch norm looks linear, and is not once its statistics have moved.
    between = [module for module in called if module is not classifier and _has_own_state(module)]
    is_linear = isinstance(classifier, nn.Linear) or (
        isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1) and classifier.groups == 1
    )
    positions = tuple(range(1, features.ndim - 1)) if features.ndim == 3 or is_channels_last(model) else (2, 3)
    mean = features.mean(dim=positions, keepdim=True)
    if is_linear and classifier.weight.shape[1] == row.numel() == pooled.shape[1]:
        fits = same(logits, F.linear(pooled, classifier.weight.flatten(1), classifier.bias))
        gated = model.forward_head(features * row_of_map, pre_logits=True).flatten(1)
        if fits and not between and same(gated, pooled * row):
            return HeadTraits("linear", same(pooled, mean.flatten(1)))
        if fits and between and all(isinstance(module, _NORMS) for module in between):
            return HeadTraits("normed")
    if features.ndim == 4 and same(model.forward_head(mean, pre_logits=True).flatten(1), pooled):
        return HeadTraits("pooled")
    return HeadTraits("map")


def find_classifier(model: Any) -> Any:
    """The layer that makes the logits; Sequencer and SAM call their whole head the classifier."""
    classifier = model.get_classifier()
    return getattr(classifier, "fc", classifier)


def _has_own_state(module: nn.Module) -> bool:
    """Whether a module itself, its children aside, holds parameters or statistics."""
    return any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False)))
