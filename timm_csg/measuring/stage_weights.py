"""The weights that make a stage's filters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_csg.metrics.display import in_one_line
from timm_csg.running import as_input, measured

_SIDE_BRANCHES = {"downsample", "shortcut", "skip", "conv_skip"}  # timm's names; they may run after the main branch


@in_one_line
class StageWeight(NamedTuple):
    """The weights that make a stage's filters.

    Attributes:
        name: Name of the convolution or linear layer in the model.
        weight: [filters, inputs], a copy.
    """

    name: str
    weight: Tensor


@torch.no_grad()
def stage_weight(model: nn.Module, images: Tensor | None = None) -> StageWeight:
    """The weights of the last layer that makes the stage's filters, one row per filter.

    That is the last convolution or linear layer called by ``forward_features`` with one output per filter and more than
    one input per output (so no depthwise one), shortcuts left aside. In a residual network the stage's output is this
    layer's plus the shortcut's, so the rows are part of what a filter sees, as in the authors' notebooks; look at
    ``name``, and pass another matrix to ``metrics.weight_similarity`` where it is not the one you mean.

    Args:
        model: A plain or differentiated timm classifier; modes and hooks are left as found.
        images: A batch for one forward pass [batch, channels, height, width]; None: a black image of the model's own
            input size.

    Returns:
        Name and weights.

    Raises:
        ValueError: If no layer has one output per filter.

    Example:
        >>> import timm
        >>> found = stage_weight(timm.create_model("test_resnet"))
        >>> found.name, found.weight.shape
        ('layer4.0.conv2', torch.Size([96, 864]))
    """
    timm_model: Any = model  # its attributes are not in nn.Module's type
    called: list[str] = []
    with measured(model):
        if images is None:
            images = torch.zeros(1, *get_model_input_config(model)["input_size"], device="cpu")
        hooks = [
            module.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not _SIDE_BRANCHES & set(name.split("."))
        ]
        try:
            features = timm_model.forward_features(as_input(model, images))
        finally:
            for hook in hooks:
                hook.remove()
    num_filters = timm_model.num_features
    modules = dict(model.named_modules())
    for name in reversed(called):
        weight: Any = modules[name].weight
        if len(weight) == num_filters and weight[0].numel() > 1 and weight.shape[1] > 1:
            return StageWeight(name, weight.detach().flatten(1).clone())
    raise ValueError(
        f"no convolution or linear layer of {type(model).__name__} makes {num_filters} filters (features "
        f"{list(features.shape)}); pass the weights [filters, inputs] to weight_similarity yourself."
    )
