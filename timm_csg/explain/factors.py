"""Factor activation maps: where in a picture one latent factor of an encoder comes from, or several together.

Works without labels on anything that turns images into a vector: the encoder of a variational auto-encoder, an
embedding model, a timm model with ``num_classes=0``. The map of factor *i* weights the encoder's last maps by the mean
gradient of the factor, as Grad-CAM does for a class (Liu et al., "Towards Visually Explaining Variational
Autoencoders", CVPR 2020, https://arxiv.org/abs/1911.07389).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_csg.checks import check_choice, whole
from timm_csg.explain.inputs import Images, as_batch
from timm_csg.running import as_input, evaluating
from timm_csg.stage import is_channels_last

Target = Literal["mean", "kl"]
Weights = Literal["mean", "position"]
Rectify = Literal["sum", "each", "absolute"]


def factor_maps(
    encoder: nn.Module,
    images: Images,
    factors: int | Sequence[int] | None = None,
    *,
    layer: nn.Module | None = None,
    target: Target = "mean",
    weights: Weights = "mean",
    rectify: Rectify = "sum",
    upsample: bool = True,
) -> Tensor:
    """The map of each factor on its own.

    With ``score_i`` the target of factor *i*, ``A_k`` the map of filter *k* and ``alpha_k`` the mean over positions of
    d score_i / d A_k, the map is ReLU(sum_k alpha_k A_k). One backward pass through the layers after the map for each
    factor.

    The mean suits encoders that pool. One that flattens its maps into a linear layer has a weight of its own for every
    position, and the mean over them says little of the factor: ``weights="position"`` keeps the gradient of each
    position (HiResCAM, Draelos and Carin, 2020, https://arxiv.org/abs/2011.08891). For such an encoder the unrectified
    map then adds up to exactly the factor's mean, less the bias.

    Args:
        encoder: ``encoder(images)`` returns the factors [batch, factors], or a pair (mean, log-variance) of that shape.
            Runs in eval mode; its modes and gradients are left as found.
        images: [batch, channels, height, width], normalised as the encoder expects; for timm models also pictures, see
            ``as_batch``.
        factors: Which factors; None: all.
        layer: The module whose output [batch, filters, height, width] is explained. None: for timm models the last
            stage, otherwise the last module that outputs maps of more than one position.
        target: What is explained: ``"mean"``, the factor's mean, where a positive map raises it; or ``"kl"``, the
            factor's part of the distribution loss, (mean² + exp(log-variance) - log-variance - 1) / 2, which shows what
            takes the factor away from the prior in either direction. Without a log-variance it is mean² / 2.
        weights: ``"mean"``: alpha_k is the mean gradient of the filter; ``"position"``: the gradient of each position.
        rectify: ``"sum"``: ReLU(sum_k alpha_k A_k); ``"each"``: sum_k ReLU(alpha_k A_k); ``"absolute"``:
            abs(sum_k alpha_k A_k).
        upsample: Bilinear, to the size of the images; otherwise the size of the maps.

    Returns:
        Maps, float32 [batch, factors, height, width], 0 or more, not normalised.

    Raises:
        TypeError: If the encoder returns neither a tensor nor a pair of tensors.
        ValueError: If a factor does not exist, or no module outputs maps that the factors depend on.

    Example:
        >>> encoder = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> factor_maps(encoder, torch.tensor([[[[4.0, 0.0]], [[0.0, 2.0]]]]), factors=0)
        tensor([[[[2., 0.]]]])
    """
    images = as_batch(encoder, images)
    with _recorded(encoder, images, layer, target) as (maps, scores):
        wanted = _checked(factors, scores.shape[1])
        parts = [_weighted(maps, _gradient(scores[:, factor], maps), weights, rectify) for factor in wanted]
    return _resized(torch.stack(parts, dim=1), images, upsample)


def factor_activation_map(
    encoder: nn.Module,
    images: Images,
    factors: int | Sequence[int] | None = None,
    *,
    joint: Literal["mean", "sum"] = "mean",
    layer: nn.Module | None = None,
    target: Target = "mean",
    weights: Weights = "mean",
    rectify: Rectify = "sum",
    upsample: bool = True,
) -> Tensor:
    """One map for several factors together; without ``factors``, for the whole embedding.

    Args:
        encoder: See ``factor_maps``.
        images: See ``factor_maps``.
        factors: Which factors; None: all.
        joint: ``"mean"``: the mean of the single maps, one backward pass for each factor, nothing cancels. ``"sum"``:
            the map of the sum of the factors, one backward pass in all; factors that pull in opposite directions
            cancel. The two are different things, both are found under the paper's name.
        layer: See ``factor_maps``.
        target: See ``factor_maps``.
        weights: See ``factor_maps``.
        rectify: See ``factor_maps``.
        upsample: See ``factor_maps``.

    Returns:
        Maps, float32 [batch, height, width], 0 or more, not normalised.

    Raises:
        TypeError: See ``factor_maps``.
        ValueError: See ``factor_maps``.

    Example:
        >>> encoder = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> factor_activation_map(encoder, torch.tensor([[[[4.0, 0.0]], [[0.0, 2.0]]]]))
        tensor([[[1.0000, 0.5000]]])
    """
    check_choice("joint", joint, ("mean", "sum"))
    images = as_batch(encoder, images)
    with _recorded(encoder, images, layer, target) as (maps, scores):
        wanted = _checked(factors, scores.shape[1])
        if joint == "sum":
            result = _weighted(maps, _gradient(scores[:, wanted], maps), weights, rectify)
        else:
            gradients = (_gradient(scores[:, factor], maps) for factor in wanted)
            result = torch.stack([_weighted(maps, gradient, weights, rectify) for gradient in gradients]).mean(dim=0)
    return _resized(result[:, None], images, upsample)[:, 0]


@contextmanager
def _recorded(
    encoder: nn.Module, images: Tensor, layer: nn.Module | None, target: Target
) -> Iterator[tuple[Tensor, Tensor]]:
    """The maps [batch, filters, height, width], and the scores [batch, factors] as a function of them."""
    check_choice("target", target, ("mean", "kl"))
    if not (layer is None or isinstance(layer, nn.Module)):
        raise TypeError(f"layer must be a module of the encoder, but is {layer!r}; pass encoder.get_submodule(name).")
    with torch.inference_mode(mode=False), torch.enable_grad(), evaluating(encoder):
        images = as_input(encoder, images, copy=images.is_inference())
        if layer is None and hasattr(encoder, "forward_features") and hasattr(encoder, "forward_head"):
            maps, output = _at_stage(encoder, images)
        else:
            maps, output = _at_layer(encoder, images, layer or _last_map_layer(encoder, images))
        yield maps, _scores(output, target)


def _at_stage(encoder: Any, images: Tensor) -> tuple[Tensor, Any]:
    """Maps [batch, filters, height, width] of a timm model's last stage, and what its head makes of them."""
    with torch.no_grad():
        features = encoder.forward_features(images)
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise ValueError(
            f"{type(encoder).__name__} does not return a map [batch, filters, height, width] from forward_features; "
            "pass layer=, one of its modules that does."
        )
    channels_last = is_channels_last(encoder)
    maps = (features.movedim(-1, 1) if channels_last else features).detach().clone().requires_grad_()
    return maps, encoder.forward_head(maps.movedim(1, -1) if channels_last else maps.clone())


def _at_layer(encoder: nn.Module, images: Tensor, layer: nn.Module) -> tuple[Tensor, Any]:
    """The output of a module, cut off from what made it, and the encoder's output as a function of it."""
    seen: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(f"layer must output maps [batch, filters, height, width], but {module} does not.")
        seen.append(output.detach().clone().requires_grad_())
        return seen[-1].clone()  # what comes after may change its input in place

    handle = layer.register_forward_hook(cut)
    try:
        output = encoder(images)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"layer was not used by encoder(images): {layer}; pass a module of the encoder.")
    return seen[-1], output


@torch.no_grad()
def _last_map_layer(encoder: nn.Module, images: Tensor) -> nn.Module:
    """The last module that finishes with an output [batch, filters, height, width] of more than one position."""
    last: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            last[:] = [module]

    handles = [module.register_forward_hook(note) for module in encoder.modules()]
    try:
        encoder(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise ValueError("no module of the encoder outputs maps [batch, filters, height, width]; pass layer=.")
    return last[0]


def _scores(output: Any, target: Target) -> Tensor:
    """Scores [batch, factors] from what the encoder returned."""
    mean, log_variance = output, None
    if isinstance(output, (tuple, list)) and len(output) == 2:
        mean, log_variance = output
    shapes = [part.shape if isinstance(part, Tensor) else None for part in (mean, log_variance) if part is not None]
    if not shapes or shapes[0] is None or len(shapes[0]) != 2 or shapes[-1] != shapes[0]:
        raise TypeError(
            "the encoder must return factors [batch, factors] or a pair (mean, log-variance) of that shape, but "
            f"returned {_described(output)}; wrap it in a module that does."
        )
    scores: Tensor = mean
    if target == "kl":
        variance_part = 0.0 if log_variance is None else log_variance.exp() - log_variance - 1
        scores = (mean.square() + variance_part) / 2
    return scores


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {', '.join(_described(part) for part in output)}"
    return f"a {type(output).__name__}"


def _checked(factors: int | Sequence[int] | None, number: int) -> list[int]:
    """The wanted factors as a list of indices from 0."""
    one = whole(factors)
    given: Any = range(number) if factors is None else factors if one is None else [one]
    wanted = [whole(factor) for factor in given]
    chosen = [factor for factor in wanted if factor is not None and 0 <= factor < number]
    if not wanted or len(chosen) < len(wanted):
        raise ValueError(f"factors must be one or more indices from 0 to {number - 1}, but are {factors!r}.")
    return chosen


def _gradient(scores: Tensor, maps: Tensor) -> Tensor:
    """Gradient of the scores' sum [batch, filters, height, width]; images of a batch do not meet in eval mode."""
    (gradient,) = torch.autograd.grad(scores.sum(), maps, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("the factors do not depend on this layer's output; pass another layer=.")
    return gradient


def _weighted(maps: Tensor, gradient: Tensor, weights: Weights, rectify: Rectify) -> Tensor:
    """Map [batch, height, width]: the filters' maps weighted by the gradient and added up."""
    check_choice("weights", weights, ("mean", "position"))
    check_choice("rectify", rectify, ("sum", "each", "absolute"))
    alpha = gradient.float() if weights == "position" else gradient.float().mean(dim=(2, 3), keepdim=True)
    evidence = maps.detach().float() * alpha
    if rectify == "each":
        return evidence.relu().sum(dim=1)
    return evidence.sum(dim=1).relu() if rectify == "sum" else evidence.sum(dim=1).abs()


def _resized(maps: Tensor, images: Tensor, upsample: bool) -> Tensor:
    if not upsample:
        return maps
    return F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
