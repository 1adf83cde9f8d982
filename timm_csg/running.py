"""What everything that runs a model over images asks of it: a whole model, in eval mode, and batches as agreed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``in_eval_mode`` for models that are whole, as ``check_whole`` asks."""
    check_whole(model)
    with in_eval_mode(model):
        yield


def checked_batches(
    loader: Iterable[Any], progress: Callable[[int], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, each checked.

    Args:
        loader: Yields (images, class indices).
        progress: Called with the number of images when a batch is done.

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
        if progress is not None:
            progress(len(targets))
