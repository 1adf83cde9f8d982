"""What can be wrong with a data set: unreadable images, labels out of range, classes without images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

_logger = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image or its label cannot be used; the message names the file."""

    def __init__(self, message: str) -> None:
        # From a loading process it comes back with that process's traceback before the message.
        super().__init__(message.rpartition("ImageError: ")[2].strip())


class CheckedImages(Dataset[tuple[Any, int]]):
    """A map-style data set whose unreadable images and wrong labels are errors that name them.

    timm's own reader puts the next image in place of one that it cannot read, which counts that one twice.

    Args:
        dataset: From ``timm.data.create_dataset``, without transform.
        num_classes: Labels must be below.
        mode: ``"RGB"`` or ``"L"``: what every image is converted to.
        new_labels: For each label of this data set the one to give; None: they stay.
    """

    def __init__(
        self, dataset: Any, num_classes: int, *, mode: str = "RGB", new_labels: list[int] | None = None
    ) -> None:
        self.dataset, self.num_classes, self.mode, self.new_labels = dataset, num_classes, mode, new_labels
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, target = self._read(index)
        except Exception as error:  # there is no end to what readers raise on bytes that are no image
            raise ImageError(
                f"{self.name(index)} cannot be read as an image ({error}); mend or remove the file, then start again."
            ) from error
        label = self._label(index, target)
        return (image if self.transform is None else self.transform(image)), label

    def name(self, index: int) -> str:
        """The file of an image, or its number where there is none."""
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index, absolute=True))
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"image {index} of {type(self.dataset).__name__}"

    def _read(self, index: int) -> tuple[Any, Any]:
        if not isinstance(self.dataset, ImageDataset):
            image, target = self.dataset[index]
            return (convert(image, self.mode) if isinstance(image, Image.Image) else image), target
        file, target, *_ = self.dataset.reader[index]
        with file, Image.open(file) as image:
            return convert(image, self.mode), target

    def _label(self, index: int, target: Any) -> int:
        if target is None or int(target) < 0:
            raise ImageError(f"{self.name(index)} has no label; is this a split for submissions?")
        label = int(target) if self.new_labels is None else self.new_labels[int(target)]
        if label >= self.num_classes:
            raise ImageError(
                f"{self.name(index)} has label {label}, but with {self.num_classes} classes labels end at "
                f"{self.num_classes - 1}; correct --num-classes or the label."
            )
        return label


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Any image as 8-bit ``"RGB"`` or ``"L"``: grey, palette, CMYK, with transparency (dropped), 16 bits of grey.

    Raises:
        ValueError: If the pixels have no fixed range, as 32-bit ones.
    """
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 and give a white image
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}) of unknown range; save it with 8 or 16 bits"
        )
    return image.convert(mode)


def classes_by_name(dataset: Any) -> dict[str, int]:
    """Names of the classes with their labels as the data set has them; empty if it does not say."""
    reader = getattr(dataset, "reader", dataset)
    candidates = [getattr(reader, name, None) for name in ("class_to_idx", "class_name_to_idx")]  # folders; tar files
    return {str(name): label for name, label in (next(filter(None, candidates), None) or {}).items()}


def labels_as_in_training(train: Any, validation: Any) -> list[int] | None:
    """The training label for each label of the validation images; None where they agree.

    Folders are numbered by name in each split on its own, so one missing class would shift all that follow.

    Raises:
        ValueError: If validation has a class that training has not.
    """
    known, found = classes_by_name(train), classes_by_name(validation)
    if known == found or not known or not found:
        return None
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(
            f"the validation images have classes that training has not: {', '.join(unknown[:8])}; both splits need "
            "folders of the same names."
        )
    missing = sorted(set(known) - set(found))
    if missing:
        _logger.warning("there are no validation images of: %s; nothing is measured for them", ", ".join(missing[:8]))
    return [known[name] for name in sorted(found, key=found.__getitem__)]


def check_folders(dataset: Any) -> None:
    """Refuse a folder with classes that have no images, which timm would leave out without a word.

    Raises:
        ValueError: If a visible subfolder holds no image.
    """
    reader = getattr(dataset, "reader", None)
    if not isinstance(reader, ReaderImageFolder):
        return
    root = Path(reader.root)
    used = {Path(path).relative_to(root).parts[0] for path, _ in reader.samples}
    empty = sorted(
        path.name for path in root.iterdir() if path.is_dir() and path.name not in used and path.name[0] not in "._"
    )
    if empty:
        raise ValueError(f"{root} has folders without images: {', '.join(empty[:8])}; fill or remove them.")
