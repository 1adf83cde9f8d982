"""How images become a model's input, the same for training, validation, evaluate, explain and report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.data import create_loader, create_transform
from timm.models import get_model_input_config
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from timm_csg.cli.settings import DIGITS, TrainSettings
from timm_csg.labels import resolved_config
from timm_csg.pictures import image_mode, read_image

FEW_IMAGES = 2000
"""Below this, starting the processes at every pass takes longer than they save."""


class Loader(Protocol):
    """Batches of (images, class indices), and how many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


def input_config(
    pretrained_cfg: dict[str, Any], in_chans: int, settings: TrainSettings, *, has_data: bool = True
) -> dict[str, Any]:
    """Size, crop, normalisation and interpolation of a model's input, as ``timm.data.resolve_data_config`` says it.

    Args:
        pretrained_cfg: The model's.
        in_chans: Channels of its images.
        settings: Of them ``img_size``, height and width in pixels, takes precedence over the model's own.
        has_data: Whether the settings name the data; the digits are not cropped.

    Returns:
        ``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``.
    """
    crop = {"crop_pct": 1.0} if has_data and settings.data == DIGITS else {}
    return resolved_config(pretrained_cfg, in_chans, img_size=settings.img_size, **crop)


def model_input_config(model: Any, settings: TrainSettings, *, has_data: bool = True) -> dict[str, Any]:
    """``input_config`` of an existing model."""
    return input_config(
        model.pretrained_cfg, get_model_input_config(model)["input_size"][0], settings, has_data=has_data
    )


def make_loader(
    dataset: Any, config: dict[str, Any], settings: TrainSettings, device: torch.device, **augmentation: Any
) -> Any:
    """The loader of a data set, which gets its transform.

    Args:
        dataset: A split without transform.
        config: From ``input_config``.
        settings: Of them ``batch_size`` and ``workers`` count.
        device: Where the batches will go.
        **augmentation: Of training; without any, the images come in order and as they are measured.
    """
    return create_loader(
        dataset,
        **config,
        is_training=bool(augmentation),
        batch_size=settings.batch_size,
        num_workers=loader_workers(settings.workers, None if isinstance(dataset, IterableDataset) else len(dataset)),
        pin_memory=device.type == "cuda",
        device=device,
        use_prefetcher=False,
        persistent_workers=False,  # persistent ones would keep random state over epochs, and a resumed run has none
        **augmentation,
    )


def loader_workers(asked: int | None, images: int | None, cores: int | None = None) -> int:
    """The number that was asked for, or one that suits the data and the machine.

    Processes that load images are started anew for every pass, so that a resumed training sees the same augmentation.
    On two cores, shared with the training, none was faster at any size: 84 photographs of 500 x 375 took 4.2 s a pass
    with a MobileNetV2 instead of 5.8 s with two processes, loading alone 0.20 s instead of 0.46 s; 2,000 pictures of 96
    x 96 took 8.8 s instead of 9.7 s, loading alone 2.1 s instead of 2.2 s.

    Args:
        asked: ``--workers``; None: not given.
        images: Of the training; None: not known, as of a stream.
        cores: Of the machine; None: those that this process may use.

    Returns:
        0 for fewer than ``FEW_IMAGES`` images or up to two cores, else 2.

    Example:
        >>> loader_workers(None, 84, cores=16), loader_workers(None, 50_000, cores=16), loader_workers(4, 84)
        (0, 2, 4)
    """
    if asked is not None:
        return asked
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_small = images is not None and images < FEW_IMAGES
    return 0 if is_small or cores <= 2 else 2


def with_sampler(loader: Any, **sampling: Any) -> Any:
    """A loader of timm with another choice of samples: ``sampler`` and ``batch_size``, or ``batch_sampler``."""
    kept = ("dataset", "num_workers", "collate_fn", "pin_memory", "worker_init_fn")
    return DataLoader(**{name: getattr(loader, name) for name in kept}, **sampling)


def read_input(path: Path, config: dict[str, Any]) -> Tensor:
    """One picture file as a loader of the same config gives it [1, channels, height, width].

    Raises:
        ImageError: If it cannot be read.
    """
    transform: Any = create_transform(**config, is_training=False)
    image: Tensor = transform(read_image(path, image_mode(config["input_size"][0])))
    return image[None]
