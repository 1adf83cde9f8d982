"""Images for ``timm-csg train``: scikit-learn's digits, image folders, and every data set that timm.data knows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset

from timm_csg import measuring
from timm_csg.cli.classes import class_names, names_in, new_labels
from timm_csg.cli.distributed import GlobalBatches, Processes
from timm_csg.cli.folders import PictureFolder
from timm_csg.cli.images import CheckedImages
from timm_csg.cli.preprocessing import Loader, make_loader, with_sampler
from timm_csg.cli.settings import DIGITS, TrainSettings
from timm_csg.pictures import image_mode

_NAMED_KINDS = ("torch", "hfds", "hfids", "tfds", "wds")


@dataclass(frozen=True)
class Data:
    """Loaders and what is known about the classes.

    Attributes:
        train: Shuffled, augmented batches.
        validation: All validation images in order.
        own_plain_train: This process's share of the training images in order, without augmentation.
        own_validation: This process's share of them, none twice; all of them in one process.
        class_names: Their names, or their numbers.
        preprocessing: How validation images are prepared, see ``input_config``.
        description: One line for people.
    """

    train: Loader
    validation: Loader
    own_plain_train: Loader
    own_validation: Loader
    class_names: list[str]
    preprocessing: dict[str, Any]
    description: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's 1,797 handwritten digits (8x8 grey, UCI), every third of each class held out for validation."""

    def __init__(self, *, is_training: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        seen = dict.fromkeys(range(10), 0)
        self.images: list[tuple[Image.Image, int]] = []
        for pixels, label in zip(digits.images, digits.target.tolist(), strict=True):
            seen[label] += 1
            if (seen[label] % 3 != 0) == is_training:
                self.images.append((Image.fromarray((pixels * (255 / 16)).astype("uint8")), label))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index]


def load_data(settings: TrainSettings, config: dict[str, Any], processes: Processes) -> Data:
    """Make the loaders.

    Args:
        settings: Resolved settings.
        config: How the model wants its images, see ``input_config``.
        processes: Who shares the batches. The device decides whether memory is pinned.

    Raises:
        ValueError: If the data set or a split is not found, its classes are unknown, fewer than two or without images,
            or the batches cannot be shared.
    """
    train, validation, names = _open_both(settings, processes)
    _check_sizes(train, validation, names, settings)
    if processes.count > 1:
        _check_shares(train, settings, processes)
    augmentation = {
        "no_aug": settings.no_aug,
        "scale": settings.scale,
        "hflip": settings.hflip,
        "color_jitter": settings.color_jitter,
        "auto_augment": settings.aa,
        "re_prob": settings.reprob,
    }
    plain = [make_loader(copy.copy(split), config, settings, processes.device) for split in (train, validation)]
    try:
        train_loader = make_loader(train, config, settings, processes.device, **augmentation)
    except (AssertionError, KeyError, ValueError, TypeError) as error:  # timm checks its policies with assertions
        raise ValueError(f"--aa {settings.aa} or the like is wrong: {str(error) or repr(error)}.") from error
    own_plain_train, own_validation = plain
    if processes.count > 1:
        batches = GlobalBatches(len(train), settings.batch_size, seed=settings.seed, processes=processes)
        train_loader = with_sampler(train_loader, batch_sampler=batches)
        own_plain_train, own_validation = (_share(loader, settings, processes) for loader in plain)
    description = f"{settings.data_name}: {len(train):,} training and {len(validation):,} validation images"
    description = f"{description}, {len(names)} classes"
    return Data(train_loader, plain[1], own_plain_train, own_validation, names, config, description)


def _share(loader: Any, settings: TrainSettings, processes: Processes) -> Any:
    """A loader of this process's share of the images."""
    share = measuring.ShardSampler(len(loader.dataset), rank=processes.rank, world_size=processes.count)
    return with_sampler(loader, sampler=share, batch_size=settings.batch_size)


def _open_both(settings: TrainSettings, processes: Processes) -> tuple[Any, Any, list[str]]:
    """Both splits, checked, and the names of the classes."""
    if settings.dataset_download and not processes.is_first:
        processes.wait_for_first("data set")
    train, validation = open_split(settings, is_training=True), open_split(settings, is_training=False)
    if settings.dataset_download and processes.is_first:
        processes.wait_for_first("data set")
    names = class_names(train, settings)
    if len(names) < 2:
        raise ValueError(
            f"--data {settings.data} has only one class ({names[0] or 'its images are not in class folders'}); a "
            "classifier needs two or more: one subfolder for each class in every split."
        )
    folder = getattr(train, "reader", None)
    if isinstance(folder, PictureFolder) and folder.empty:
        listed = ", ".join(folder.empty[:8])
        raise ValueError(f"{folder.root} has folders without images: {listed}; fill or remove them.")
    both = names_in(train) and names_in(validation)
    other = new_labels(names, both, of="the training split", data="the validation split") if both else None
    if isinstance(train, IterableDataset) or isinstance(validation, IterableDataset):
        return train, validation, names
    mode = image_mode(settings.in_chans)
    checked = CheckedImages(train, len(names), mode=mode)
    return checked, CheckedImages(validation, len(names), mode=mode, new_labels=other), names


def _check_sizes(train: Any, validation: Any, names: list[str], settings: TrainSettings) -> None:
    """Refuse what would fail after the training, or at once with an obscure message."""
    if isinstance(train, IterableDataset) or isinstance(validation, IterableDataset):
        return
    if len(train) < settings.batch_size:
        raise ValueError(
            f"--batch-size {settings.batch_size} is larger than the training set ({len(train)} images); choose a "
            "smaller one."
        )
    folder = getattr(validation.dataset, "reader", None)
    if not isinstance(folder, PictureFolder):
        return
    labels = {label for _, label in folder.samples}
    if len(labels) < 2:
        only = next(name for name, label in folder.class_to_idx.items() if label in labels)
        others = [name for name in names if name != only][:8]
        raise ValueError(
            f"all validation images of --data {settings.data} belong to the class {only}; to measure anything, add "
            f"images of other classes ({', '.join(others)})."
        )
    if len(validation) < 3:
        raise ValueError(
            f"--data {settings.data} has {len(validation)} validation images; measuring needs at least 3, and "
            "dozens of each class to be reliable."
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
            f"--batch-size {size} is for all processes together and cannot be shared equally by {count}; use a "
            f"multiple of {count}, such as {count * max(1, round(size / count))}."
        )


def open_split(settings: TrainSettings, *, is_training: bool) -> Any:
    """The training or validation split, without transforms; digits and folders by us, the rest as timm opens it.

    Args:
        settings: Resolved, as far as they describe the data.
        is_training: Which split.

    Raises:
        ValueError: If it is not found.
    """
    if settings.data == DIGITS:
        return Digits(is_training=is_training)
    split = settings.train_split if is_training else settings.val_split
    name, root, folder = settings.data, settings.data_dir, settings.folder
    if folder is not None:
        place = _place_of_split(folder, split, settings)
        if place.is_dir():
            pictures = PictureFolder(
                place, fraction=settings.val_fraction, seed=settings.val_seed or 0, is_training=is_training
            )
            return ImageDataset(str(place), reader=pictures)
        name, root = "", str(place)
    else:
        _check_name(settings)
    try:
        return create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            seed=settings.seed,
            input_img_mode=image_mode(settings.in_chans or 3),
        )
    except (RuntimeError, OSError, AssertionError, ImportError, KeyError) as error:
        raise ValueError(f"cannot open the {split!r} split of --data {settings.data}: {error}") from error


def _check_name(settings: TrainSettings) -> None:
    """Refuse what is not a name for timm, which would take the folder of ``--data-dir`` for it."""
    kind, slash, _ = settings.data.partition("/")
    if not slash or kind.lower() not in _NAMED_KINDS:
        listed = ", ".join(f"{known}/" for known in _NAMED_KINDS)
        raise ValueError(
            f"--data {settings.data} is not a folder, and names that timm.data knows begin with {listed}; give "
            f"{DIGITS}, a folder, or such a name."
        )
    if kind.lower() == "torch" and settings.data_dir is None:
        raise ValueError(f"--data {settings.data} needs --data-dir, the folder where it is or is to be stored.")


def _place_of_split(root: Path, split: str, settings: TrainSettings) -> Path:
    """The subfolder or tar file of a split, or the folder of the class folders that ``--val-fraction`` divides."""
    if not root.is_dir():
        raise ValueError(f"--data names the folder {root}, which does not exist.")
    if settings.val_fraction is not None:
        validation = _places(root, settings.val_split)
        if validation:
            raise ValueError(f"--val-fraction is for folders without validation images, but found {validation[0]}.")
        return next((place for place in _places(root, settings.train_split) if place.is_dir()), root)
    places = _places(root, split)
    if not places:
        raise ValueError(
            f"{root} has no {split!r} split: expected a folder of that name (one subfolder for each class) or a .tar "
            f"file, found {', '.join(sorted(path.name for path in root.iterdir())[:8]) or 'nothing'}; name yours with "
            "--train-split and --val-split, or hold out a part of the pictures with --val-fraction 0.2."
        )
    return places[0]


def _places(root: Path, split: str) -> list[Path]:
    """Subfolders or tar files of a split that exist; timm knows synonyms such as val and test for validation."""
    names = [split, *(("validation", "val", "test", "eval") if split in ("validation", "val") else ())]
    return [path for name in names for path in (root / name, root / f"{name}.tar") if path.exists()]


def has_validation(settings: TrainSettings) -> bool:
    """Whether the folder of the settings has validation images of its own."""
    return settings.folder is not None and bool(_places(settings.folder, settings.val_split))
