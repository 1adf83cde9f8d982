"""Maps from any explanation, checked; the model that they explain left as found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_csg.checks import whole
from timm_csg.running import as_input, check_labelled, evaluating

Explain = Callable[[Any, Tensor, Tensor], Any]
"""``explain(model, images, targets)`` returns maps [batch, height, width], a tensor or an array, as large as images."""


@contextmanager
def as_found(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """The model in eval mode and seeded random states; modes, gradients and random states as found afterwards.

    The states are torch's, NumPy's and Python's, since explanations of other packages draw from all of them. Some call
    ``backward`` on the whole model: gradients of the user's last step are put aside meanwhile.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"judges take the explanation first, then a model, but found {type(model).__name__} there.")
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    devices = sorted({parameter.device.index or 0 for parameter in parameters if parameter.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    for parameter in parameters:
        parameter.grad = None
    try:
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices), torch.inference_mode(mode=False), evaluating(model):
            torch.random.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless the value is a whole number of at least so much."""
    if (whole(value) or 0) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}.")


def check_maps(maps: Any, images: Tensor, explain: Any = "explain") -> Tensor:
    """Maps as a float32 tensor on the images' device.

    Raises:
        TypeError, ValueError: If they are not maps [batch, height, width] of the images' size, or not finite.
    """
    name = explain if isinstance(explain, str) else getattr(explain, "__name__", type(explain).__name__)
    try:
        found = torch.as_tensor(maps, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must return maps [batch, height, width] as a tensor or an array, but returned "
            f"{type(maps).__name__}."
        ) from error
    expected = [len(images), *images.shape[-2:]]
    if list(found.shape) != expected:
        raise ValueError(
            f"{name} must return one map as large as each image, {expected}, but returned {list(found.shape)}; sum "
            "over colours (maps.sum(1)), and resize coarse maps to the image (torch.nn.functional.interpolate)."
        )
    found = found.detach().float()
    bad = (~found.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"{name} returned maps that are not finite for {len(bad)} of {len(images)} images, the first is number "
            f"{bad[0]}; check the model's outputs, or its precision."
        )
    return found


def maps_of(explain: Explain, model: nn.Module, images: Tensor, targets: Tensor, batch_size: int = 32) -> Tensor:
    """Maps of all images, float32 [images, height, width], on the images' device; inside ``as_found``."""
    if not callable(explain):
        raise TypeError(
            f"explain must be a function (model, images, targets) -> maps, such as timm_csg.explain.grad_cam, but is "
            f"{explain!r}."
        )
    found = []
    for batch, labels in batches(model, images, targets, batch_size):
        with torch.enable_grad():
            found.append(check_maps(explain(model, batch.clone(), labels), batch, explain).to(images.device))
    return torch.cat(found)


def given_or_made(
    maps: Tensor | None, explain: Explain, model: nn.Module, images: Tensor, targets: Tensor, batch_size: int, seed: int
) -> Tensor:
    """The maps that a judge was given, checked, or made now; and images and targets checked."""
    check_labelled(model, images, targets)
    if maps is not None:
        return check_maps(maps, images, "maps")
    with as_found(model, seed):
        return maps_of(explain, model, images, targets, batch_size)


def batches(model: nn.Module, images: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in the model's precision and targets, both on its device."""
    check_count("batch_size", size)
    for batch, labels in zip(images.split(size), targets.split(size), strict=True):
        batch = as_input(model, batch)
        yield batch, labels.to(batch.device).long()


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Softmax of the logits [batch, classes], float32.

    Raises:
        TypeError: If the model does not return logits [batch, classes].
    """
    logits: Any = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model must return logits [batch, classes], but returned {found}.")
    return logits.float().softmax(dim=1)


def of_targets(chances: Tensor, targets: Tensor) -> Tensor:
    """The probability of each image's target [batch].

    Raises:
        ValueError: If a target is no class of the model.
    """
    if int(targets.max()) >= chances.shape[1]:
        raise ValueError(
            f"the model has {chances.shape[1]} classes, but there is a target {int(targets.max())}; "
            "classes are counted from 0."
        )
    return chances.gather(1, targets[:, None]).squeeze(1)
