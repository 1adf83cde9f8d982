"""What the metrics that run a model need to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def is_channels_last(model: nn.Module) -> bool:
    """Whether 4-D features are [batch, height, width, filters]; timm says so in ``output_fmt``."""
    return str(getattr(model, "output_fmt", "NCHW")) == "NHWC"


_LOUD = 1024.0  # a response whose part of the logits is large beside the bias: half precision keeps its digits


def check_whole(model: nn.Module) -> None:
    """Raise if a model is sharded: what runs its stage and its head one by one passes by the hooks that gather it.

    Raises:
        ValueError: With the way to a whole model.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is sharded by fully_shard, but metrics, explanations and the assignment of "
            "filters need a whole model; assign before sharding, and measure or explain what save_pretrained (in every "
            "process) and from_pretrained make of it."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back in its own mode afterwards; as ``check_whole``."""
    check_whole(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def checked_batches(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, each checked.

    Raises:
        TypeError: If one is no pair of images and targets, or the images are not floating-point numbers.
    """
    for batch in loader:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not is_pair or not all(isinstance(part, Tensor) for part in batch):
            parts = batch if is_pair else [batch]
            found = " and ".join(type(part).__name__ for part in parts)
            raise TypeError(
                f"the loader must yield two tensors, (images, targets), but yields {found}; for dictionaries pass "
                "((batch['image'], batch['label']) for batch in loader), with their own keys."
            )
        images, targets = batch
        if not images.is_floating_point():
            raise TypeError(
                f"the loader's images must be floating-point numbers, normalised as in training, but are "
                f"{images.dtype}; see timm.data.create_transform."
            )
        yield images, targets


def seen_features(model: nn.Module, images: Tensor) -> Tensor:
    """The features as the head sees them without a label: behind the mechanism, if that acts at inference (ICNN)."""
    timm_model: Any = model  # its methods are not in nn.Module's type
    features: Tensor = timm_model.forward_features(images)
    mechanism = getattr(model, "mechanism", None)
    if getattr(mechanism, "acts_without_targets", False):
        features = timm_model.mechanism(features)
    return features


def seen_maps(model: nn.Module, images: Tensor) -> Tensor:
    """The same as maps [batch, filters, height, width], whatever their layout.

    Raises:
        ValueError: If the features are no map.
    """
    features = seen_features(model, images)
    if features.ndim != 4:
        raise ValueError(
            f"{type(model).__name__} has tokens instead of a feature map, so its filters have no location in the "
            "image; use a model with a feature map (see find_stage(model).layout)."
        )
    return features.permute(0, 3, 1, 2) if is_channels_last(model) else features


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
