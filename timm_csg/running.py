"""What everything that runs a model over images asks of it: a whole model, in eval mode, and batches as agreed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_csg.checks import check_class_indices
from timm_csg.hooks import check_hooks, in_eval_mode

_logger = logging.getLogger(__name__)
_FAR_OUT = 4  # times the largest value that a normalised image can have


def check_whole(model: nn.Module) -> None:
    """Raise if a model is sharded: what runs its stage and its head one by one passes by the hooks that gather it.

    Raises:
        TypeError: If it is no model.
        ValueError: With the way to a whole model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model first, then the images, but found {type(model).__name__} as the model; pass "
            "timm.create_model(...)."
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is sharded by fully_shard, but metrics, explanations and the assignment of "
            "filters need a whole model; assign before sharding, and measure or explain what save_pretrained (in every "
            "process) and from_pretrained make of it."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``in_eval_mode`` for models that are whole, as ``check_whole`` asks."""
    check_whole(model)
    with in_eval_mode(model):
        yield


@contextmanager
def measured(model: nn.Module) -> Iterator[None]:
    """``evaluating`` for what asks a timm model for its stage.

    Raises:
        TypeError: If the model has no ``forward_features``; with what to pass instead.
        ValueError: If a hook on the model changes what it returns, see ``hooks.check_hooks``.
    """
    check_whole(model)
    if not hasattr(model, "forward_features"):
        inner = getattr(model, "module", None)
        remedy = "the model inside, .module" if hasattr(inner, "forward_features") else "timm.create_model(...)"
        raise TypeError(f"{type(model).__name__} has no forward_features(), as timm's classifiers have; pass {remedy}.")
    with in_eval_mode(model):
        check_hooks(model)
        yield


def check_images(model: Any, images: Any, first: int = 0) -> None:
    """Raise unless a model can take these images: what is decided here once for all that runs a model.

    Args:
        model: Any module; of a timm model the number of channels is known, and the size if it is fixed.
        images: What should be images [batch, channels, height, width].
        first: The number of the first one, for the message.

    Raises:
        TypeError: If they are no tensor of floating-point numbers.
        ValueError: If there are none, they do not suit the model, or values are NaN or infinite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a floating-point tensor, normalised as in training, but are {found}; "
            "see timm.data.create_transform."
        )
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"images must be [batch, channels, height, width] with at least one image, but have shape "
            f"{list(images.shape)}; for a single image pass images[None]."
        )
    channels, size = _expected(model)
    if channels not in (None, images.shape[1]):
        remedy = "; pass images.expand(-1, 3, -1, -1)" if (images.shape[1], channels) == (1, 3) else ""
        raise ValueError(f"{type(model).__name__} takes images of {channels} channels, not {images.shape[1]}{remedy}.")
    if size not in (None, tuple(images.shape[2:])):
        raise ValueError(
            f"{type(model).__name__} takes images of {size[0]} x {size[1]} pixels only, not "
            f"{images.shape[2]} x {images.shape[3]}; resize them, or make the model with img_size=... ."
        )
    if not images.is_meta and not bool(images.detach().sum(dtype=torch.float32).isfinite()):
        bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"images must be finite, but {len(bad)} of {len(images)} hold NaN or infinity, the first is number "
                f"{first + bad[0]}; look at how it is read and normalised."
            )


def pixels_in(model: Any, images: Tensor) -> str:
    """A sentence if images can only be pixels from 0 to 255 where the model expects normalised ones; else nothing.

    Example:
        >>> import timm
        >>> pixels_in(timm.create_model("test_resnet"), torch.tensor([0.0, 200.0]))
        'images have values from 0 to 200, but normalised ones of this model reach 1: these are pixels from 0 to 255.'
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("mean") or not config.get("std") or images.numel() == 0 or images.is_meta:
        return ""
    largest = max((1 - mean) / std for mean, std in zip(config["mean"], config["std"], strict=False))
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and _FAR_OUT * largest < high <= 255):
        return ""
    return (
        f"images have values from {low:.3g} to {high:.3g}, but normalised ones of this model reach {largest:.3g}: "
        "these are pixels from 0 to 255."
    )


def warn_of_pixels(model: Any, images: Tensor) -> None:
    """Log what ``pixels_in`` finds; looks at all values, so it is for one batch."""
    found = pixels_in(model, images)
    if found:
        _logger.warning("%s Normalise them as the model expects, see timm.data.create_transform.", found)


def _expected(model: Any) -> tuple[int | None, tuple[int, int] | None]:
    """Channels, and height and width, that a model insists on; None where it does not."""
    if not getattr(model, "pretrained_cfg", None):
        return None, None
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
    return get_model_input_config(model)["input_size"][0], size


def _classes(model: Any) -> int | None:
    """How many classes a timm model knows; None of other modules, and of encoders."""
    return (getattr(model, "num_classes", None) or None) if getattr(model, "pretrained_cfg", None) else None


def as_input(model: nn.Module, images: Tensor, *, copy: bool = False) -> Tensor:
    """Images on a model's device and in its precision."""
    like = next((part for part in model.parameters() if part.is_floating_point()), images)
    return images.detach().to(like, non_blocking=True, copy=copy)


def check_labelled(model: Any, images: Any, targets: Any) -> None:
    """Raise unless a model can take these images and there is the index of one of its classes for each.

    Raises:
        TypeError, ValueError: As ``check_images`` and ``checks.check_class_indices``.
    """
    check_images(model, images)
    check_class_indices(targets, _classes(model))
    _check_one_each(images, targets)


def _check_one_each(images: Tensor, targets: Tensor) -> None:
    if len(targets) != len(images):
        raise ValueError(
            f"there must be one target for every image, but there are {len(targets)} for {len(images)} images."
        )


def checked_batches(
    model: nn.Module, loader: Iterable[Any], progress: Callable[[int], None] | None = None, *, soft: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, each checked, on a model's device, images also in its precision; empty ones left out.

    Args:
        model: What the images are for, see ``check_images``.
        loader: Yields (images, class indices).
        progress: Called with the number of images when a batch is done.
        soft: Whether targets may be rows [batch, classes], which are not checked here.

    Raises:
        TypeError: If a batch is no pair of images and targets, or one of them has the wrong type.
        ValueError: If images do not suit the model, or there is not one class index for each.
    """
    first = 0
    for images, targets in pairs(loader):
        if len(images) == 0:
            continue
        images = as_input(model, images)
        check_images(model, images, first)  # on the device, where looking through all values is cheapest
        if first == 0:
            warn_of_pixels(model, images)
        _check_one_each(images, targets)
        if not (soft and targets.ndim == 2):
            check_class_indices(targets, _classes(model))
        yield images, targets.to(images.device)
        first += len(images)
        if progress is not None:
            progress(len(targets))


def pairs(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, each two tensors, the first of floating-point numbers.

    Raises:
        TypeError: If one is something else.
    """
    try:
        batches = iter(loader)
    except TypeError as error:
        raise TypeError(f"the loader must yield batches, but is {type(loader).__name__}.") from error
    for batch in batches:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if is_pair and all(isinstance(part, Tensor) for part in batch) and not batch[1].ndim:
            raise TypeError("the loader yields single samples, not batches; pass a DataLoader of this data set.")
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
