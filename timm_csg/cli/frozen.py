"""What a frozen backbone makes of pictures that are not augmented: computed once, kept, and trained from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from timm_csg import measuring
from timm_csg.cli.display import LiveDisplay
from timm_csg.cli.engine import Training
from timm_csg.cli.preprocessing import Loader, with_sampler
from timm_csg.model import hold_frozen

LARGEST = 4 * 2**30
"""Most bytes of memory for features; where they need more, the frozen layers run in every epoch."""


def without_frozen_layers(training: Training, train: Any, display: LiveDisplay) -> Loader:
    """The training batches as the frozen backbone leaves them, if it leaves them alike in every epoch.

    That is so with ``--freeze backbone`` and ``--no-aug``, unless the features depend on trained parameters (timm has
    the last norm of some models there) or on chance (dropout between the layers). Each process runs its share of the
    pictures through the layers, and all keep all features.

    Args:
        training: What is trained.
        train: Batches of pictures.
        display: Told how far the pass is, or in one sentence why there is none.

    Returns:
        ``FeatureBatches``, the same batches in the same order; ``train`` itself where that cannot be.
    """
    unchanged: Loader = train
    settings, pictures = training.settings, train.dataset
    is_done = training.epochs_done >= settings.epochs
    if settings.freeze != "backbone" or not settings.no_aug or is_done or isinstance(pictures, IterableDataset):
        return unchanged
    with display.counting("frozen layers, once", len(pictures) // training.processes.count) as advance:
        found = _features_once(training, train, advance)
    if isinstance(found, str):
        display.say(f"{training.name}: {found}, so the frozen layers run in every epoch")
        return unchanged
    for part in found.tensors:
        training.processes.complete_(part)
    return FeatureBatches(training.model, found, train)


def _features_once(training: Training, train: Any, advance: Callable[[int], None]) -> TensorDataset | str:
    """Features and targets of this process's share of the pictures, 0 for the others; or why they cannot be kept."""
    count, processes = len(train.dataset), training.processes
    share = measuring.ShardSampler(count, rank=processes.rank, world_size=processes.count)
    features, targets = torch.empty(0, device="cpu"), torch.zeros(count, dtype=torch.long, device="cpu")
    done = 0
    for images, labels in with_sampler(train, sampler=share, batch_size=training.settings.batch_size):
        found = _features(training, training.model.eval(), images)
        if done == 0:
            refusal = _refusal(training, images, found, count)
            if refusal is not None:
                return refusal
            features = torch.zeros(count, *found.shape[1:], dtype=found.dtype, device="cpu")
        rows = share.indices[done : done + len(labels)]
        features[rows], targets[rows] = found.cpu(), labels
        done += len(labels)
        advance(len(labels))
    return TensorDataset(features, targets)


class FeatureBatches:
    """Batches of features; while they are gone through, the model takes features in the place of images.

    Args:
        model: Whose ``forward_features`` made them.
        dataset: Features and targets, in the order of the pictures.
        loader: Of the pictures: its batches are drawn in the same way.
    """

    def __init__(self, model: nn.Module, dataset: TensorDataset, loader: Any) -> None:
        self.model, self.batch_sampler = model, loader.batch_sampler
        self.batches = DataLoader(dataset, batch_size=None, sampler=loader.batch_sampler, pin_memory=loader.pin_memory)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        model: Any = self.model
        model.forward_features = lambda features, **_: features  # of a ViT it gets a mask, too
        try:
            yield from self.batches
        finally:
            del model.forward_features


def _features(training: Training, model: Any, images: Tensor) -> Any:
    """What a backbone makes of images, with gradients where something in it is trained after all."""
    images = images.to(training.device, non_blocking=True)
    if training.settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(training.device.type, dtype=training.amp_dtype, enabled=training.amp_dtype is not None):
        return model.forward_features(images)


def _refusal(training: Training, images: Tensor, found: Any, pictures: int) -> str | None:
    """Why features cannot be kept; None if they can."""
    if not isinstance(found, Tensor):
        return "the features are not one tensor"
    if found.requires_grad:
        return "a trained layer is among those that make the features"
    size = pictures * found[0].nbytes
    if size > LARGEST:
        return f"the features of all pictures need {size / 2**30:.1f} GB of memory, more than {LARGEST / 2**30:g}"
    in_training = copy.deepcopy(training.model).train()
    hold_frozen(in_training)
    if not torch.equal(_features(training, in_training, images), found):
        return "some frozen layers, such as dropout, act in training only"
    return None
