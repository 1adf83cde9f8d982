"""Images for ``timm-csg train``: scikit-learn's digits, image folders, and every data set that timm.data knows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_csg import measuring
from timm_csg.cli.distributed import GlobalBatches, Processes
from timm_csg.cli.folders import PictureFolder
from timm_csg.cli.images import CheckedImages, classes_by_name, image_mode, labels_by_name
from timm_csg.cli.settings import DIGITS, TrainSettings, check_data_name

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
        own_plain_train: This process's share of the training images in order, without augmentation.
        own_validation: This process's share of them, none twice; all of them in one process.
        num_classes: Number of classes.
        class_names: Their names, or their numbers.
        preprocessing: How validation images are prepared, as ``resolve_data_config`` says it.
        description: One line for people.
    """

    train: Loader
    validation: Loader
    own_plain_train: Loader
    own_validation: Loader
    num_classes: int
    class_names: list[str]
    preprocessing: dict[str, Any]
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


def load_data(settings: TrainSettings, data_config: dict[str, Any], processes: Processes) -> Data:
    """Make the loaders.

    Args:
        settings: Resolved settings.
        data_config: The model's, from ``timm.data.resolve_data_config``.
        processes: Who shares the batches. The device decides whether memory is pinned.

    Raises:
        ValueError: If the data set or a split is not found, its classes are unknown, fewer than two or without images,
            or the batches cannot be shared.
    """
    if settings.data == DIGITS:
        train: Any = Digits(is_training=True)
        validation: Any = Digits(is_training=False)
        names = [str(digit) for digit in range(10)]
    else:
        train, validation, names = _open_both(settings, processes)
    _check_sizes(train, validation, names, settings)
    if processes.count > 1:
        _check_shares(train, settings, processes)
    common = {
        "input_size": data_config["input_size"],
        "batch_size": settings.batch_size,
        "interpolation": data_config["interpolation"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": settings.workers,
        "pin_memory": processes.device.type == "cuda",
        "device": processes.device,
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
    if settings.data == DIGITS:
        data_config = data_config | {"crop_pct": 1.0}
    plain_train = copy.copy(train)  # timm's loader gives its data set the transform
    try:
        train_loader = create_loader(train, is_training=True, **common, **augmentation)
    except (AssertionError, KeyError, ValueError, TypeError) as error:  # timm checks its policies with assertions
        raise ValueError(f"--aa {settings.aa} or the like is wrong: {str(error) or repr(error)}.") from error
    cropping = {"crop_pct": data_config["crop_pct"], "crop_mode": data_config["crop_mode"]}
    validation_loader = create_loader(validation, is_training=False, **cropping, **common)
    own_validation = validation_loader
    own_plain_train = create_loader(plain_train, is_training=False, **cropping, **common)
    if processes.count > 1:
        batches = GlobalBatches(len(train), settings.batch_size, seed=settings.seed, processes=processes)
        train_loader = _with_sampler(train_loader, batch_sampler=batches)
        share = measuring.ShardSampler(len(validation), rank=processes.rank, world_size=processes.count)
        own_validation = _with_sampler(validation_loader, sampler=share, batch_size=settings.batch_size)
        share = measuring.ShardSampler(len(plain_train), rank=processes.rank, world_size=processes.count)
        own_plain_train = _with_sampler(own_plain_train, sampler=share, batch_size=settings.batch_size)
    description = f"{settings.data_name}: {len(train):,} training and {len(validation):,} validation images"
    description = f"{description}, {len(names)} classes"
    loaders = (train_loader, validation_loader, own_plain_train, own_validation)
    return Data(*loaders, len(names), names, data_config, description)


def _open_both(settings: TrainSettings, processes: Processes) -> tuple[Any, Any, list[str]]:
    """Both splits, checked, and the names of the classes."""
    if settings.dataset_download and processes.count > 1 and not processes.is_first:
        processes.wait_for_first("data set")
    train, validation = open_split(settings, is_training=True), open_split(settings, is_training=False)
    if settings.dataset_download and processes.is_first:
        processes.wait_for_first("data set")
    names = class_names(train, settings)
    if len(names) < 2:
        raise ValueError(
            f"--data {settings.data} has one class only ({names[0] or 'its images lie in no folder of a class'}); a "
            "classifier needs two or more: one subfolder for each class in every split."
        )
    if isinstance(train, PictureFolder) and train.empty:
        raise ValueError(f"{train.root} has folders without images: {', '.join(train.empty[:8])}; fill or remove them.")
    new_labels = labels_by_name(names, validation) if classes_by_name(train) else None
    if isinstance(train, IterableDataset) or isinstance(validation, IterableDataset):
        return train, validation, names
    mode = image_mode(settings.in_chans)
    checked = CheckedImages(train, len(names), mode=mode)
    return checked, CheckedImages(validation, len(names), mode=mode, new_labels=new_labels), names


def _check_sizes(train: Any, validation: Any, names: list[str], settings: TrainSettings) -> None:
    """Refuse what would fail after the training, or at once in words that nobody understands."""
    if isinstance(train, IterableDataset) or isinstance(validation, IterableDataset):
        return
    if len(train) < settings.batch_size:
        raise ValueError(
            f"--batch-size {settings.batch_size} is more than the {len(train)} training images; choose a smaller one."
        )
    folder = getattr(validation, "dataset", None)
    if not isinstance(folder, PictureFolder):
        return
    labels = {label for _, label in folder.samples}
    if len(labels) < 2:
        only = next(name for name, label in folder.class_to_idx.items() if label in labels)
        others = [name for name in names if name != only][:8]
        raise ValueError(
            f"all validation images of --data {settings.data} are of the class {only}; to measure anything, add images "
            f"of other classes ({', '.join(others)})."
        )
    if len(validation) < 3:
        raise ValueError(
            f"--data {settings.data} has {len(validation)} validation images; measuring needs at least 3, and dozens "
            "of each class to be trusted."
        )


def _check_shares(train: Any, settings: TrainSettings, processes: Processes) -> None:
    if isinstance(train, IterableDataset):
        raise ValueError(
            f"--data {settings.data} is a streaming data set; multi-process training needs a known length: use one "
            "process, or folders, .tar files, torch/ or hfds/."
        )
    size, count = settings.batch_size, processes.count
    if size % count:
        raise ValueError(
            f"--batch-size {size} is for all processes together and cannot be shared equally by {count}; take a "
            f"multiple of {count}, such as {count * max(1, round(size / count))}."
        )


def _with_sampler(loader: Any, **sampling: Any) -> Any:
    """The loader that timm made, with another choice of samples."""
    kept = ("dataset", "num_workers", "collate_fn", "pin_memory", "worker_init_fn")
    return DataLoader(**{name: getattr(loader, name) for name in kept}, **sampling)


def open_split(settings: TrainSettings, *, is_training: bool) -> Any:
    """The training or validation split of the settings, without transforms; folders by us, the rest as timm opens it.

    Raises:
        ValueError: If it is not found.
    """
    split = settings.train_split if is_training else settings.val_split
    name, root = settings.data, settings.data_dir
    folder = settings.folder
    if folder is not None:
        if settings.val_fraction is not None:
            whole, seed = _undivided(folder, settings), settings.val_seed or 0
            return PictureFolder(whole, fraction=settings.val_fraction, seed=seed, is_training=is_training)
        place = _folder_of_split(folder, split)
        if place.is_dir():
            return PictureFolder(place)
        name, root = "", str(place)
    else:
        check_data_name(settings)
    try:
        return create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            seed=settings.seed,
            input_img_mode="L" if settings.in_chans == 1 else "RGB",
        )
    except (RuntimeError, OSError, AssertionError, ImportError, KeyError) as error:
        raise ValueError(f"cannot open the {split!r} split of --data {settings.data}: {error}") from error


def _places(root: Path, split: str) -> list[Path]:
    """Subfolders or tar files of a split that are there; timm knows synonyms such as val and test for validation."""
    names = [split, *(("validation", "val", "test", "eval") if split in ("validation", "val") else ())]
    return [path for name in names for path in (root / name, root / f"{name}.tar") if path.exists()]


def _folder_of_split(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise ValueError(f"--data names the folder {root}, which does not exist.")
    places = _places(root, split)
    if places:
        return places[0]
    raise ValueError(
        f"{root} has no {split!r} split: expected a folder of that name (one subfolder for each class) or a .tar file, "
        f"found {', '.join(sorted(path.name for path in root.iterdir())[:8]) or 'nothing'}; name yours with "
        "--train-split and --val-split, or hold out a part of the pictures with --val-fraction 0.2."
    )


def has_validation(settings: TrainSettings) -> bool:
    """Whether the folder of the settings has validation images of its own."""
    return settings.folder is not None and bool(_places(settings.folder, settings.val_split))


def _undivided(root: Path, settings: TrainSettings) -> Path:
    """The folder of the class folders that ``--val-fraction`` divides."""
    if not root.is_dir():
        raise ValueError(f"--data names the folder {root}, which does not exist.")
    validation = _places(root, settings.val_split)
    if validation:
        raise ValueError(f"--val-fraction divides a folder without validation images, but there is {validation[0]}.")
    return next((place for place in _places(root, settings.train_split) if place.is_dir()), root)


def class_names(dataset: Any, settings: TrainSettings, *, default: int | None = None) -> list[str]:
    """Names of the classes, or their numbers; ``default`` is how many there are where nothing says so.

    Raises:
        ValueError: If their number is not known, or not that of the settings.
    """
    by_name = classes_by_name(dataset)
    if by_name:
        names = sorted(by_name, key=by_name.__getitem__)
        if settings.num_classes not in (None, len(names)):
            raise ValueError(f"--num-classes is {settings.num_classes}, but the data has {len(names)} classes.")
        return names
    count = settings.num_classes or default
    if count is None:
        raise ValueError(f"--data {settings.data} does not say how many classes it has; add --num-classes.")
    return [str(index) for index in range(count)]
