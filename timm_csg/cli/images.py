"""How every command reads images; unreadable files and wrong labels are named."""

from __future__ import annotations

import functools
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from timm.data import ImageDataset
from torch.utils.data import Dataset

from timm_csg.cli.folders import shown

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
        except Exception as error:  # readers raise anything on bytes that are not an image
            raise unreadable(self.name(index), error) from error
        label = self._label(index, target)
        return (image if self.transform is None else self.transform(image)), label

    def name(self, index: int) -> str:
        """The file of an image, or its number if it has none."""
        if isinstance(self.dataset, ImageDataset):
            return shown(str(self.dataset.filename(index, absolute=True)))
        samples = getattr(self.dataset, "samples", None)
        return shown(str(samples[index][0])) if samples else f"image {index} of {type(self.dataset).__name__}"

    def _read(self, index: int) -> tuple[Any, Any]:
        if isinstance(self.dataset, ImageDataset):
            file, target, *_ = self.dataset.reader[index]
            with file, Image.open(file) as image:
                return convert(image, self.mode), target
        image, target = self.dataset[index]
        return (convert(image, self.mode) if isinstance(image, Image.Image) else image), target

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


def unreadable(name: str, error: Exception) -> ImageError:
    """The error that names an image which cannot be read."""
    return ImageError(f"{name} cannot be read as an image ({error}); fix or remove the file, then try again.")


def image_mode(channels: int) -> str:
    """Pillow's mode of the images for a model.

    Raises:
        ValueError: If the model takes images that are neither grey nor RGB.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"the model expects images of {channels} channels, but pictures are read as grey (1) or RGB (3); use a "
            "model with 1 or 3 channels, or your own data set and timm_csg.metrics and timm_csg.explain."
        )
    return "L" if channels == 1 else "RGB"


def read_image(path: Path, mode: str) -> Image.Image:
    """A picture file as every command sees it.

    Args:
        path: The file.
        mode: ``"RGB"`` or ``"L"``.

    Raises:
        ImageError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return convert(image, mode)
    except Exception as error:  # readers raise anything on bytes that are not an image
        raise unreadable(shown(str(path)), error) from error


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Any image as 8-bit ``"RGB"`` or ``"L"``, upright as viewers show it.

    Grey, palette, CMYK, with transparency (dropped), 16 bits of grey (their upper 8); turned as the EXIF orientation
    says, which timm's own reader does not do.

    Raises:
        ValueError: If the pixels have no fixed range, as 32-bit ones.
    """
    image = _upright(image)
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 and give a white image
        deep = np.asarray(image)
        if deep.max(initial=0) < 4096:
            _warn_of_dark_images()
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}) of unknown range; save it with 8 or 16 bits"
        )
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except (SyntaxError, struct.error, ValueError, TypeError):  # damaged EXIF data, which viewers overlook
        return image


@functools.cache
def _warn_of_dark_images() -> None:
    _logger.warning(
        "an image of 16 bits has no value above 4095 and is read as nearly black; if your camera gives 12 bits, save "
        "the images with 8 bits or scaled to 16"
    )
