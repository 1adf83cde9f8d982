"""The pictures of the report: small JPEGs and maps of a few cells, each kept once, as classes of a style sheet.

A map stays on the grid of the stage, and the browser enlarges it: a few hundred bytes instead of a second picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from timm_csg.plots.heat import heat_colours, heat_levels

SIDES = (160, 128, 112, 96, 80, 64, 48)  # pixels of a thumbnail, the largest that fits the budget
_QUALITY = 82


def fetch_images(loader: Any, indices: Iterable[int], targets: Tensor) -> dict[int, Tensor]:
    """Some images of a loader, by their place in its order.

    Args:
        loader: The one that the targets come from.
        indices: Places.
        targets: The classes that were seen in the first pass [images].

    Returns:
        Images [channels, height, width] by place.

    Raises:
        ValueError: If the images come in another order than before.
    """
    wanted = sorted(set(indices))
    found: dict[int, Tensor] = {}
    dataset: Any = getattr(loader, "dataset", None)
    in_order = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if in_order and hasattr(dataset, "__getitem__") and loader.batch_size is not None:
        for index in wanted:
            image, label = dataset[index]
            if isinstance(image, Tensor) and int(label) == int(targets[index]):
                found[index] = image
    if len(found) == len(wanted):
        return found
    start, left = 0, set(wanted)
    for images, labels in loader:
        here = [index for index in left if start <= index < start + len(labels)]
        for index in here:
            if int(labels[index - start]) != int(targets[index]):
                raise ValueError(
                    "the loader yields the images in a different order every time, so they cannot be found again; "
                    "pass one that does not shuffle (shuffle=False, is_training=False)."
                )
            found[index] = images[index - start].detach().float().cpu()
        left -= set(here)
        start += len(labels)
        if not left:
            break
    return found


def displayable(image: Tensor, model: nn.Module) -> Tensor:
    """A normalised image with values from 0 to 1: timm's normalisation undone, or stretched where it was another."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean = torch.tensor(config.get("mean") or IMAGENET_DEFAULT_MEAN, device="cpu")
    std = torch.tensor(config.get("std") or IMAGENET_DEFAULT_STD, device="cpu")
    if len(mean) != len(image):
        mean, std = torch.full((len(image),), 0.5, device="cpu"), torch.full((len(image),), 0.5, device="cpu")
    image = image.float()
    pixels = image * std[:, None, None] + mean[:, None, None]
    if float(pixels.min()) < -0.02 or float(pixels.max()) > 1.02:
        pixels = image - image.min()
        pixels = pixels / pixels.max().clamp_min(1e-12)
    if len(pixels) not in (1, 3):
        pixels = pixels[:3] if len(pixels) > 3 else pixels[:1]
    return pixels.clamp(0, 1)


class Pictures:
    """Thumbnails and maps, each with the name of the style-sheet class that shows it.

    Args:
        images: Values from 0 to 1, [channels, height, width], by their number.
        budget: Most bytes of all thumbnails together, as they stand in the file.
    """

    def __init__(self, images: dict[int, Tensor], budget: int) -> None:
        self.images = images
        self.side = self._fitting_side(budget)
        self._rules: dict[str, str] = {}
        self._maps: dict[bytes, str] = {}

    def _fitting_side(self, budget: int) -> int:
        """The largest side with which a sample of the thumbnails, scaled up to all, stays within the budget."""
        numbers = sorted(self.images)
        sample = numbers[:: max(1, len(numbers) // 24)]
        for side in SIDES:
            mean_size = sum(len(_jpeg(self.images[number], side)) for number in sample) / max(1, len(sample))
            if mean_size * 4 / 3 * len(numbers) <= budget:
                return side
        return SIDES[-1]

    def image(self, number: int) -> str:
        """The class of a thumbnail."""
        name = f"i{number}"
        if name not in self._rules:
            self._rules[name] = _uri("image/jpeg", _jpeg(self.images[number], self.side))
        return name

    def heat(self, heat: Tensor, scale: float | None = None) -> str:
        """The class of a map [map height, map width]; an empty name where nothing responds."""
        levels = heat_levels(heat, scale)
        if not levels.any():
            return ""
        picture = Image.fromarray(levels.numpy(), mode="P")
        colours = heat_colours()
        picture.putpalette(colours[:, :3].flatten().tolist())
        data = _png(picture, transparency=bytes(colours[:, 3].tolist()))
        name = self._maps.setdefault(data, f"h{len(self._maps)}")
        self._rules.setdefault(name, _uri("image/png", data))
        return name

    def style(self) -> str:
        """The style sheet; with the shape of the images."""
        shape = next(iter(self.images.values())).shape if self.images else (3, 1, 1)
        rules = [f".i{{aspect-ratio:{shape[2]}/{shape[1]}}}"]
        rules += [f".{name}{{background-image:url({uri})}}" for name, uri in self._rules.items()]
        return "\n".join(rules)


def matrix_picture(matrix: Tensor, colour: Sequence[int]) -> str:
    """A matrix with values from 0 to 1 as a picture of one pixel for each entry, one colour, the value its opacity.

    Returns:
        A data address for ``<img src>``.
    """
    opacity = matrix.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = torch.cat(
        [torch.tensor(list(colour), dtype=torch.uint8, device="cpu").expand(*opacity.shape, 3), opacity[..., None]], 2
    )
    return _uri("image/png", _png(Image.fromarray(pixels.numpy(), mode="RGBA")))


def _jpeg(image: Tensor, side: int) -> bytes:
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    shrink = side / max(picture.size)
    if shrink < 1:
        size = (max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    is_tiny = max(picture.size) <= 48
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92 if is_tiny else _QUALITY, optimize=True, subsampling=0 if is_tiny else 2)
    return buffer.getvalue()


def _png(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **options)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
