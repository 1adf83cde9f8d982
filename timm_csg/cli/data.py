"""Images for ``timm-csg train``: scikit-learn's digits, image folders, and every data set that timm.data knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import Dataset

from timm_csg.cli.settings import DIGITS, TrainSettings

_logger = logging.getLogger(__name__)


class Loader(Protocol):
    """Batches of (images, class indices), and how many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Data:
    """Loaders and what is known about the classes.

    Attributes:
        train: Shuffled, augmented batches.
        validation: All validation images in order.
        num_classes: Number of classes.
        class_names: Their names, or their numbers.
        description: One line for people.
    """

    train: Loader
    validation: Loader
    num_classes: int
    class_names: list[str]
    description: str


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's 1,797 handwritten digits (8x8 grey, UCI), every third of each class held out for validation."""

    def __init__(self, *, is_training: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        seen: dict[int, int] = {}
        self.samples: list[tuple[Image.Image, int]] = []
        for pixels, label in zip(digits.images, digits.target, strict=True):
            seen[label] = seen.get(label, 0) + 1
            if (seen[label] % 3 != 0) == is_training:
                image = Image.fromarray((pixels * (255 / 16)).astype("uint8")).convert("RGB")
                self.samples.append((image, int(label)))
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.samples[index]
        return (image if self.transform is None else self.transform(image)), label


def load_data(settings: TrainSettings, data_config: dict[str, Any], device: torch.device) -> Data:
    """Make the loaders.

    Args:
        settings: Resolved settings.
        data_config: The model's, from ``timm.data.resolve_data_config``.
        device: Decides whether memory is pinned.

    Raises:
        ValueError: If the data set or a split is not found, or its classes are unknown.
    """
    if settings.data == DIGITS:
        train: Any = Digits(is_training=True)
        validation: Any = Digits(is_training=False)
        names = [str(digit) for digit in range(10)]
    else:
        train, validation = _create(settings, is_training=True), _create(settings, is_training=False)
        names = _class_names(train, settings)
    common = {
        "input_size": data_config["input_size"],
        "batch_size": settings.batch_size,
        "interpolation": data_config["interpolation"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": settings.workers,
        "pin_memory": device.type == "cuda",
        "device": device,
        "use_prefetcher": False,
        "persistent_workers": False,  # persistent ones would keep random state over epochs, and a resumed run has none
    }
    augmentation = {
        "no_aug": settings.no_aug,
        "scale": settings.scale,
        "hflip": settings.hflip,
        "color_jitter": settings.color_jitter,
        "auto_augment": settings.aa,
        "re_prob": settings.reprob,
    }
    crop = 1.0 if settings.data == DIGITS else data_config["crop_pct"]
    train_loader = create_loader(train, is_training=True, **common, **augmentation)
    validation_loader = create_loader(validation, is_training=False, crop_pct=crop, **common)
    description = f"{settings.data}: {len(train):,} training and {len(validation):,} validation images"
    return Data(train_loader, validation_loader, len(names), names, f"{description}, {len(names)} classes")


def _create(settings: TrainSettings, *, is_training: bool) -> Any:
    split = settings.train_split if is_training else settings.val_split
    name, root = settings.data, settings.data_dir
    if name.startswith("folder:") or Path(name).is_dir():
        name, root = "", name.removeprefix("folder:")
        root = str(_folder_of_split(Path(root), split))
    try:
        return create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            seed=settings.seed,
            num_classes=settings.num_classes,
            input_img_mode="L" if settings.in_chans == 1 else "RGB",
        )
    except (RuntimeError, OSError, AssertionError, ImportError, KeyError) as error:
        raise ValueError(f"cannot open the {split!r} split of --data {settings.data}: {error}") from error


def _folder_of_split(root: Path, split: str) -> Path:
    """The subfolder or tar file of a split; timm knows synonyms such as val and test for validation."""
    if not root.is_dir():
        raise ValueError(f"--data names the folder {root}, which does not exist.")
    names = [split, *(("validation", "val", "test", "eval") if split in ("validation", "val") else ())]
    for name in names:
        for candidate in (root / name, root / f"{name}.tar"):
            if candidate.exists():
                return candidate
    raise ValueError(
        f"{root} has no {split!r} split: expected one of {', '.join(names)} as a folder (one subfolder for each class) "
        f"or .tar file, found {', '.join(sorted(path.name for path in root.iterdir())[:8]) or 'nothing'}; "
        "name yours with --train-split and --val-split."
    )


def _class_names(dataset: Any, settings: TrainSettings) -> list[str]:
    reader = getattr(dataset, "reader", dataset)
    candidates = [getattr(reader, name, None) for name in ("class_to_idx", "class_name_to_idx")]  # folders; tar files
    by_name: dict[str, int] | None = next(filter(None, candidates), None)
    if by_name:
        names = sorted(by_name, key=by_name.__getitem__)
        if settings.num_classes not in (None, len(names)):
            raise ValueError(f"--num-classes is {settings.num_classes}, but the data has {len(names)} classes.")
        return [str(name) for name in names]
    if settings.num_classes is None:
        raise ValueError(f"--data {settings.data} does not say how many classes it has; add --num-classes.")
    return [str(index) for index in range(settings.num_classes)]
