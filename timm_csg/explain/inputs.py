"""What may be explained: tensors as the model takes them, or pictures of any kind, with the model's own transform.

Decided here once for all functions of ``timm_csg.explain``: file names, folders, Pillow images, NumPy arrays and lists
of these become the tensor that the model was trained on; what can only be a mistake gets a sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from timm_csg.checks import nearest
from timm_csg.labels import class_index, class_names, input_config
from timm_csg.pictures import convert, find_pictures, image_mode, read_image, shown
from timm_csg.running import check_images, pixels_in

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor"
Images: TypeAlias = "Picture | Sequence[Picture]"
"""A tensor of normalised images, or a picture, several, or a folder of them."""

Loader: TypeAlias = "Iterable[Any] | str | os.PathLike[str]"

MOST_PICTURES = 512
"""Pictures that are explained at once; a loop over parts takes more."""
_CHANNELS = (1, 3, 4)


def as_batch(model: Any, images: Images) -> Tensor:
    """Images of any kind as the batch that a model takes.

    A floating-point tensor is taken as it is: normalised as in training. Everything else is a picture, or several, and
    goes through the model's own transform: resized, cropped and normalised as the preprocessing in its
    ``pretrained_cfg`` says, which ``from_pretrained`` reads from the checkpoint.

    Args:
        model: A timm model, not wrapped.
        images: Tensor [batch, channels, height, width]; or the name of a file or folder, a Pillow image, an array
            [height, width, channels] of integers from 0 to 255 or floats from 0 to 1, a tensor of integers [channels,
            height, width]; or a list of these. Arrays and tensors may hold a batch.

    Returns:
        Floating-point images [batch, channels, height, width]; those made of pictures are on the CPU.

    Raises:
        TypeError: If it is nothing of the kind, such as a whole batch of a loader.
        ValueError: If a file is missing or no picture, or values are out of their range.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> as_batch(model, Image.new("RGB", (500, 400))).shape
        torch.Size([1, 3, 160, 160])
    """
    if isinstance(images, Tensor) and images.is_floating_point():
        check_images(model, images)
        _check_normalised(model, images)
        return images
    _refuse_loader_batches(images)
    prepare = _Preparation(model)
    parts = [prepare(item) for item in _each(images)]
    if not parts:
        raise ValueError("images must hold at least one image, but are an empty list.")
    sizes = sorted({tuple(part.shape) for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"all images must have the same size, but have {', '.join(map(str, sizes[:4]))}; resize them.")
    batch = torch.stack(parts)
    check_images(model, batch)
    return batch


def image_batches(model: Any, loader: Loader, size: int = 32) -> Iterator[Tensor]:
    """The images of a loader, or the pictures of a folder in the order of their names.

    Raises:
        ValueError: If the folder holds no pictures, or one cannot be read.
    """
    if isinstance(loader, (str, os.PathLike)):
        prepare, files = _Preparation(model), _files(Path(loader).expanduser())
        for start in range(0, len(files), size):
            yield torch.stack([prepare(file) for file in files[start : start + size]])
        return
    batches: Iterable[Any] = loader
    for batch in batches:
        images: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield images


def class_by_name(model: Any, targets: Any) -> Any:
    """Targets with names of classes replaced by their indices; everything else as it is.

    Raises:
        ValueError: If the model does not know a name.
    """
    if isinstance(targets, str):
        return _index(model, targets)
    if isinstance(targets, (list, tuple)):
        return [_index(model, target) if isinstance(target, str) else target for target in targets]
    return targets


def _index(model: Any, name: str) -> int:
    names = class_names(model)
    if names is None:
        raise ValueError(
            f"targets name the class {name!r}, but this {type(model).__name__} has no names of its classes; pass an "
            "index, or save_pretrained(model, folder, class_names=[...]) and load that."
        )
    return class_index(name, names)


class _Preparation:
    """The model's own transform, made when the first picture needs it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._made: tuple[Callable[[Image.Image], Tensor], str] | None = None

    def __call__(self, item: Any) -> Tensor:
        """One image [channels, height, width]."""
        if isinstance(item, Tensor) and item.is_floating_point():
            _check_normalised(self.model, item)
            return item
        transform, mode = self._transform()
        if isinstance(item, (str, os.PathLike)):
            return transform(read_image(Path(item), mode))
        if isinstance(item, Image.Image):
            return transform(convert(item, mode))
        if isinstance(item, Tensor):
            item = item.detach().cpu().numpy()
        return transform(convert(_from_array(item), mode))

    def _transform(self) -> tuple[Callable[[Image.Image], Tensor], str]:
        if self._made is None:
            if not getattr(self.model, "pretrained_cfg", None):
                raise TypeError(
                    f"{type(self.model).__name__} does not say how its pictures are prepared (no pretrained_cfg, as "
                    "timm models have); pass a floating-point tensor [batch, channels, height, width]."
                )
            config = input_config(self.model)
            names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
            transform: Any = create_transform(is_training=False, **{name: config[name] for name in names})
            self._made = transform, image_mode(config["input_size"][0])
        return self._made


def _each(images: Any) -> Iterator[Any]:
    """Single images, whatever they come in."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _each(image)
    elif isinstance(images, (str, os.PathLike)):
        path = Path(images).expanduser()
        if path.is_dir():
            yield from _files(path, most=MOST_PICTURES)
            return
        if not path.exists():
            beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ValueError(f"there is no picture {shown(str(path))}.{nearest(path.name, beside)}")
        yield path
    elif isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (Image.Image, Tensor, np.ndarray)):
        yield images
    else:
        raise TypeError(
            "images must be a floating-point tensor [batch, channels, height, width], normalised as in training, or "
            f"pictures (file or folder, Pillow image, NumPy array, or a list of these), but found "
            f"{type(images).__name__}."
        )


def _files(folder: Path, most: int | None = None) -> list[Path]:
    found = find_pictures(folder)
    files = [folder / picture for pictures in found.pictures.values() for picture in pictures]
    if not files:
        raise ValueError(f"{shown(str(folder))} holds no pictures.")
    if most is not None and len(files) > most:
        raise ValueError(
            f"{shown(str(folder))} holds {len(files):,} pictures, and {most} are explained at once; pass "
            "lists of files."
        )
    return files


def _from_array(array: Any) -> Image.Image:
    """A picture from an array [height, width], [height, width, channels] or [channels, height, width]."""
    if array.ndim == 3 and array.shape[2] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, 2)
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)):
        raise ValueError(
            f"an array must be a picture [height, width, channels] with 1, 3 or 4 channels, but has shape "
            f"{list(array.shape)}."
        )
    is_float = np.issubdtype(array.dtype, np.floating)
    if not is_float and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"an array must hold integers from 0 to 255 or floats from 0 to 1, but holds {array.dtype}.")
    low, high, most = float(array.min()), float(array.max()), 1 if is_float else 255
    if not (low >= 0 and high <= most):
        remedy = "pass array.astype('uint8')" if is_float and low >= 0 and high <= 255 else "scale it"
        raise ValueError(
            f"an array of {array.dtype} is taken for a picture with values from 0 to {most}, but has {low:.4g} to "
            f"{high:.4g}; {remedy}, or pass a tensor [batch, channels, height, width] if it is normalised already."
        )
    pixels = np.round(array * 255) if is_float else array
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _check_normalised(model: Any, images: Tensor) -> None:
    """Refuse tensors that can only be pixels from 0 to 255."""
    found = pixels_in(model, images)
    if found:
        raise ValueError(
            f"{found} Pass images.to(torch.uint8), which are then resized and normalised as the model wants it, or "
            "normalise them as in training."
        )


def _refuse_loader_batches(images: Any) -> None:
    """Dictionaries, and tuples of images and targets, which are what a loader yields."""
    if isinstance(images, Mapping):
        found = [key for key, value in images.items() if isinstance(value, Tensor) and value.ndim == 4]
        remedy = f"batch[{found[0]!r}]" if found else "the tensor of images in it"
        keys = ", ".join(map(repr, list(images)[:6]))
        raise TypeError(f"images are a dictionary with {keys}; pass {remedy}.")
    if isinstance(images, (tuple, list)) and len(images) == 2:
        first, second = images
        if isinstance(first, Tensor) and first.ndim == 4 and isinstance(second, Tensor) and second.ndim in (1, 2):
            raise TypeError("images are a batch of (images, targets); pass batch[0], and batch[1] as targets.")
