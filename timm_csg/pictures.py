"""Finding and reading pictures: in one way, for commands and for whoever passes a file name to a function."""

from __future__ import annotations

import functools
import logging
import os
import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

_logger = logging.getLogger(__name__)
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # need other programs, or hold no pixels
_JUNK = {"thumbs.db", "desktop.ini"}
_DAMAGED = (SyntaxError, struct.error, ValueError, TypeError)  # by EXIF data that viewers overlook


class ImageError(ValueError):
    """An image or its label cannot be used; the message names the file."""

    def __init__(self, message: str) -> None:
        # From a loading process it comes back with that process's traceback before the message.
        super().__init__(message.rpartition("ImageError: ")[2].strip())


def shown(name: str) -> str:
    r"""A file's name as text that every file, page and terminal can hold: NFC, escapes for what is not printable.

    Example:
        >>> shown("caf" + chr(0xDCE9)), shown("cafe" + chr(0x301)) == "café"
        ('caf\\xe9', True)
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return unicodedata.normalize("NFC", text)


@dataclass
class Found:
    """What lies below a folder.

    Attributes:
        pictures: Files by the folder that holds them, both relative to the root.
        ignored: How many files or folders were left out, and an example, by what they are.
    """

    pictures: dict[Path, list[Path]] = field(default_factory=dict)
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)

    def ignore(self, kind: str, path: Path) -> None:
        """Count something that is left out."""
        count, example = self.ignored.get(kind, (0, shown(str(path))))
        self.ignored[kind] = (count + 1, example)

    def say_what_is_ignored(self, root: Path) -> None:
        """One line in the log, once for each root."""
        if self.ignored:
            _warn_once(f"ignored in {shown(str(root))}: {self.summary()}")

    def summary(self) -> str:
        """What was ignored, with numbers and examples."""
        parts = [f"{kind}: {count:,}, such as {example}" for kind, (count, example) in sorted(self.ignored.items())]
        return "; ".join(parts)


@functools.cache
def _warn_once(text: str) -> None:
    _logger.warning(text)


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes of files that Pillow reads, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in _NO_PICTURES)


def find_pictures(root: Path) -> Found:
    """All pictures below a folder; hidden folders and links to a folder above are left out.

    Args:
        root: The folder; links to folders are followed.
    """
    found = Found()
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place).relative_to(root)
        folders[:] = sorted(visible(Path(place), folders, folder, found))
        pictures = []
        for name in sorted(files):
            if name.startswith(".") or name.lower() in _JUNK:
                continue
            suffix = Path(name).suffix.lower()
            if suffix in picture_suffixes():
                pictures.append(folder / name)
            else:
                found.ignore(f"{shown(suffix)} files" if suffix else "files without suffix", folder / name)
        if pictures:
            found.pictures[folder] = pictures
    return found


def visible(place: Path, names: list[str], folder: Path, found: Found) -> Iterator[str]:
    """The folders of a place that count; the others are noted in ``found``."""
    for name in names:
        if name.startswith(".") or name == "__MACOSX":
            found.ignore("hidden folders", folder / name)
        elif (place / name).is_symlink() and (place / name).resolve() in _on_the_way(place):
            found.ignore("links to a folder above", folder / name)
        else:
            yield name


def _on_the_way(place: Path) -> set[Path]:
    """A folder and those above it, where it is and where links on the way to it lead."""
    here = place.resolve()
    return {here, *here.parents, *(parent.resolve() for parent in place.absolute().parents)}


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


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file as viewers and all commands show it; only its header is read.

    Raises:
        ImageError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            lies_on_its_side = _orientation(image) in (5, 6, 7, 8)
            return (height, width) if lies_on_its_side else (width, height)
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
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    except _DAMAGED:
        return image


def _orientation(image: Image.Image) -> int:
    """How the picture is to be turned, 1 for not at all, as EXIF numbers it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:
        return 1


@functools.cache
def _warn_of_dark_images() -> None:
    _logger.warning(
        "an image of 16 bits has no value above 4095 and is read as nearly black; if your camera gives 12 bits, save "
        "the images with 8 bits or scaled to 16"
    )
