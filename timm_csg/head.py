"""What a timm model's head does with the features: one response per filter and a linear layer, or more."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Linear as CastingLinear
from torch import Tensor, nn

from timm_csg.checks import whole
from timm_csg.hooks import changes_layer, in_eval_mode
from timm_csg.mechanisms.base import HeadKind
from timm_csg.stage import is_channels_last

_LOUD = 1024.0  # a response whose part of the logits is large beside the bias: half precision keeps its digits
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, CastingLinear.forward)
_REFUSALS = (RuntimeError, ValueError, IndexError)  # of a head for tokens that is given a map, and the other way round


class HeadTraits(NamedTuple):
    """What ``probe_head`` found: kind and pooling as in ``mechanisms.Head``, and the modules that the head calls."""

    kind: HeadKind
    pools_by_mean: bool = False
    modules: tuple[nn.Module, ...] = ()


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
    """``probe_head``, and whether the head takes the mean over positions; the arguments are the same."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if parameter.device.type == "meta":
        return HeadTraits("map")
    generator = torch.Generator().manual_seed(0)
    with in_eval_mode(model):
        for shape in _small_shapes(model, num_filters):
            features = torch.rand(shape, generator=generator, device="cpu").to(parameter)
            channels_last = len(shape) == 3 or is_channels_last(model)
            row = torch.rand(num_filters, generator=generator, device="cpu").to(parameter)
            try:
                return _traits(model, features, row if channels_last else row[:, None, None], row)
            except _REFUSALS:
                continue
    return HeadTraits("map")


@torch.no_grad()
def check_logits(model: Any, num_filters: int) -> None:
    """Raise unless a plain model's logits are [batch, classes]; seen on a small map of zeros, also on the meta device.

    Args:
        model: A plain timm classifier.
        num_filters: Width of its features.

    Raises:
        ValueError: If they have another shape; a head that rejects small maps is checked by the first batch.
    """
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with in_eval_mode(model):
        for shape in _small_shapes(model, num_filters):
            try:
                logits = model.forward_head(torch.zeros(shape, device=parameter.device, dtype=parameter.dtype))
            except _REFUSALS:
                continue
            check_shape(logits, model)
            return


def check_shape(logits: Any, model: Any) -> None:
    """Raise unless logits are one tensor [batch, classes].

    Args:
        logits: What the model gave.
        model: The model, for the message.

    Raises:
        ValueError: If they are anything else; the message says what to change.
    """
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return
    name = type(model).__name__
    if isinstance(logits, Tensor):
        raise ValueError(
            f"{name} gives logits of shape {list(logits.shape)} instead of [batch, classes], because its head does not "
            "pool; make it with pooling, for example timm.create_model(..., global_pool='avg')."
        )
    remedy = "; pass the model that gives one."
    if getattr(model, "distilled_training", False):
        remedy = ", because it is in distilled training mode; call model.set_distilled_training(False), which trains "
        remedy += "the mean of its heads."
    raise ValueError(f"{name} gives a {type(logits).__name__} instead of logits [batch, classes]{remedy}")


def _small_shapes(model: Any, num_filters: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of features to try a head on: a map, and tokens."""
    return (1, 7, 7, num_filters) if is_channels_last(model) else (1, num_filters, 7, 7), (1, 16, num_filters)


def _traits(model: Any, features: Tensor, row_of_map: Tensor, row: Tensor) -> HeadTraits:
    classifier = find_classifier(model)
    has_tensors = isinstance(getattr(classifier, "weight", None), Tensor | None)
    is_exact = features.dtype in (torch.float32, torch.float64) and has_tensors
    tolerance = 1e-3 if is_exact else 5e-2  # a quantised layer's weight is no tensor

    def same(found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).abs().max() <= tolerance * (expected.abs().max() + 1e-6))

    def run(**options: bool) -> tuple[Tensor, list[nn.Module]]:
        called: list[nn.Module] = []
        with nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: called.append(module)):
            return model.forward_head(features, **options).flatten(1), called

    (pooled, before), (logits, called) = run(pre_logits=True), run()
    # A fresh batch norm looks linear, and is not once its statistics have moved.
    own = set(classifier.modules()) if isinstance(classifier, nn.Module) else set()
    between = [module for module in called if module not in own and _has_own_state(module)]
    positions = tuple(range(1, features.ndim - 1)) if features.ndim == 3 or is_channels_last(model) else (2, 3)
    mean = features.mean(dim=positions, keepdim=True)
    if _inputs_of_linear(classifier) == row.numel() == pooled.shape[1]:
        fits = same(logits, F.linear(pooled, *effective_weight(classifier)))
        gated = model.forward_head(features * row_of_map, pre_logits=True).flatten(1)
        if fits and not between and same(gated, pooled * row):
            return HeadTraits("linear", same(pooled, mean.flatten(1)), tuple(called))
        # Norms behind what pre_logits gives (LeViT's batch norm) are no part of ``pooled``.
        if fits and between and all(isinstance(module, _NORMS) and module in before for module in between):
            return HeadTraits("normed", modules=tuple(called))
    if features.ndim == 4 and same(model.forward_head(mean, pre_logits=True).flatten(1), pooled):
        return HeadTraits("pooled", modules=tuple(called))
    return HeadTraits("map", modules=tuple(called))


def find_classifier(model: Any) -> Any:
    """The layer that makes the logits; Sequencer and SAM call their whole head the classifier."""
    classifier = model.get_classifier()
    return getattr(classifier, "fc", classifier)


def effective_weight(classifier: Any) -> tuple[Tensor, Tensor | None]:
    """What a linear classifier really multiplies with: weight [classes, filters] and bias [classes] or None.

    A plain layer's own tensors. Where a layer does more than its ``weight`` says (LoRA, pruning, weight norm,
    quantisation, sharding, forward hooks), what it makes of zeros and of every filter alone, with gradients.
    """
    if is_plain_layer(classifier):
        return classifier.weight.flatten(1), classifier.bias
    tensors = (tensor for tensor in chain(classifier.parameters(), classifier.buffers()) if tensor.is_floating_point())
    like = next(tensors, torch.zeros((), device="cpu", dtype=torch.float32))
    width = _inputs_of_linear(classifier) or 0
    alone = torch.eye(width + 1, width, device=like.device, dtype=like.dtype)  # the last row is zeros
    is_convolution = isinstance(getattr(classifier, "base_layer", classifier), nn.Conv2d)
    with torch.autocast(like.device.type, enabled=False):
        answers = classifier(alone[:, :, None, None] if is_convolution else alone).flatten(1)
    return (answers[:-1] - answers[-1]).T, answers[-1]


def is_plain_layer(classifier: Any) -> bool:
    """Whether a linear classifier's function is that of its ``weight`` and ``bias``, which can be changed in place.

    Its shards after a step count where ``fully_shard`` gathers it with the model, not where the layer's own hooks do.
    """
    weight = getattr(classifier, "_parameters", {}).get("weight")
    is_shard = hasattr(weight, "full_tensor") and not classifier._forward_pre_hooks
    wraps = hasattr(weight, "__tensor_flatten__") and not is_shard  # a quantised tensor, or one that hooks gather
    return (
        type(classifier).forward in _PLAIN_FORWARDS
        and isinstance(weight, Tensor)
        and not (wraps or changes_layer(classifier))
    )


def _inputs_of_linear(classifier: Any) -> int | None:
    """Filters that go into a linear layer, a 1x1 convolution, or what stands for one; None for anything else."""
    layer = getattr(classifier, "base_layer", classifier)  # of LoRA and its relatives
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if layer.kernel_size == (1, 1) and layer.groups == 1 else None
    return whole(getattr(layer, "in_features", None))


def _has_own_state(module: nn.Module) -> bool:
    """Whether a module itself, its children aside, holds parameters or statistics."""
    return any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False)))


class LinearHead(NamedTuple):
    """A head whose logits are ``responses @ weight.T + bias``; float64 weight [classes, filters], bias [classes]."""

    weight: Tensor
    bias: Tensor


def pooled_responses(model: Any, features: Tensor) -> Tensor:
    """The responses that a linear head would add up [batch, filters]: mean over a map, the head's own over tokens."""
    if features.ndim == 4:
        return features.mean(dim=(1, 2) if is_channels_last(model) else (2, 3))
    responses: Tensor = model.forward_head(features, pre_logits=True)
    return responses


@torch.no_grad()
def find_linear_head(model: Any, features: Tensor) -> LinearHead | None:
    """What each filter alone adds to the logits, if sums of it are what the head makes of these features; else None.

    The head itself is asked, with every filter alone and with none, so a layer that does more than its ``weight`` says
    (LoRA, pruning) is read right. Its answers with all filters and with every other one must be those sums.
    """
    if getattr(getattr(model, "mechanism", None), "acts_without_targets", False):
        return None
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    in_channels = features.ndim == 4 and not is_channels_last(model)
    width = features.shape[1 if in_channels else -1]
    some = torch.arange(width, device=features.device) % 2
    positions = [1, 1] if features.ndim == 4 else [1 + int(getattr(model, "num_prefix_tokens", 0))]
    alone = _LOUD * torch.eye(width + 1, width, device=features.device)  # the last row is zeros
    alone = alone.view(width + 1, *(1 for _ in positions), width).expand(-1, *positions, -1)
    features = features.to(parameter.dtype)
    maps = alone.movedim(-1, 1) if in_channels else alone
    cut = features * (some[:, None, None] if in_channels else some)
    try:
        with torch.autocast(parameter.device.type, enabled=False):
            alone_logits, *found = (
                _float64(model.forward_head(given.to(parameter.dtype))) for given in (maps, features, cut)
            )
            responses = _float64(pooled_responses(model, features))
    except (RuntimeError, ValueError, IndexError):
        return None  # a head that takes no single position
    head = LinearHead((alone_logits[:-1] - alone_logits[-1]).T / _LOUD, alone_logits[-1])
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 5e-2
    sums = [given @ head.weight.T + head.bias for given in (responses, responses * some.to(responses.device))]
    fits = all(
        logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance * (expected.abs().max() + 1e-6)
        for logits, expected in zip(found, sums, strict=True)
    )
    return head if fits else None


def _float64(values: Tensor) -> Tensor:
    """On the CPU where the device has no such numbers."""
    return (values.cpu() if values.device.type == "mps" else values).double()


@torch.no_grad()
def head_on_pooled(model: nn.Module, responses: Tensor, logits: Tensor) -> HeadOnPooled | None:
    """A model's head as a model of its own, whose images are pooled responses; None where the head needs more.

    It saves the backbone's pass to whatever removes or changes responses of images that were seen before.

    Args:
        model: A timm classifier.
        responses: Mean responses of some images [batch, filters].
        logits: What the model made of these images [batch, classes].
    """
    head = HeadOnPooled(model)
    try:
        with in_eval_mode(model):
            found = head.forward_head(head.forward_features(responses[:, :, None, None])).cpu()
    except _REFUSALS:
        return None
    fits = found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-3, atol=1e-3)
    return head if fits else None


class HeadOnPooled(nn.Module):
    """A timm model that starts where the features have been pooled: maps of one position."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.output_fmt = model, getattr(model, "output_fmt", "NCHW")

    def forward_features(self, responses: Tensor) -> Tensor:
        """Responses [batch, filters, 1, 1] as maps in the layout of the model."""
        return responses.movedim(1, 3) if is_channels_last(self) else responses

    def forward_head(self, features: Tensor) -> Tensor:
        """The model's own head."""
        device = next(self.model.parameters()).device
        logits: Tensor = self.model.forward_head(features.to(device))
        return logits
