"""The animal pictures of animal_parts.py: read, cut out, and in batches."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from timm_csg.measuring.annotations import Annotations

SIZE, CROPS = 160, 10
RESIZE = v2.Resize((SIZE, SIZE), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
CROP = [v2.RandomResizedCrop(SIZE, scale=(0.4, 1), antialias=True), v2.RandomHorizontalFlip()]
RANDOM_CROP = v2.Compose([*CROP, v2.ColorJitter(0.2, 0.2, 0.2)])


def read_pictures(tar: Path) -> tuple[list[Tensor], list[str]]:
    """Pictures uint8 [3, height, width] and their names in the archive, sorted."""
    with tarfile.open(tar) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".jpg"))
        files = [io.BytesIO(archive.extractfile(name).read()) for name in names]
    return [v2.functional.pil_to_tensor(Image.open(file).convert("RGB")) for file in files], names


def crop_objects(pictures: list[Tensor], marks: Annotations, *, margin: float = 0.1) -> tuple[list[Tensor], Tensor]:
    """The main object of each picture with a margin around, and x0, y0, x1, y1 of what was cut out [pictures, 4]."""
    corners = marks.object_boxes().unflatten(1, (2, 2))
    edge = (corners[:, 1] - corners[:, 0]) * margin
    corners = torch.stack([(corners[:, 0] - edge).clamp(min=0), corners[:, 1] + edge], dim=1)
    sizes = torch.tensor([picture.shape[:0:-1] for picture in pictures])
    regions = torch.minimum(corners, sizes[:, None]).flatten(1).round().long()
    cut = [picture[:, y0:y1, x0:x1] for picture, (x0, y0, x1, y1) in zip(pictures, regions.tolist(), strict=True)]
    return cut, regions.float()


class Pictures(NamedTuple):
    """Features of pictures behind the frozen layers: of the whole picture, and of random crops for training.

    With ``regions``, x0, y0, x1, y1 in pixels, each "whole" picture is only this part of the file.
    """

    whole: Tensor
    crops: list[Tensor]
    targets: Tensor
    names: list[str]
    regions: Tensor

    def select(self, rows: Tensor) -> Pictures:
        """Some of them."""
        names = [self.names[row] for row in rows]
        crops = [crop[rows] for crop in self.crops]
        return Pictures(self.whole[rows], crops, self.targets[rows], names, self.regions[rows])

    def epoch(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of one crop of every picture; whole batches only."""
        for rows in torch.randperm(len(self.targets)).split(batch_size)[: len(self.targets) // batch_size]:
            yield as_stored(self.crops[epoch % len(self.crops)][rows]), self.targets[rows]


def one_against_others(pictures: Pictures, name: str, *, others: int = 3) -> Pictures:
    """The pictures of one class with label 1, and ``others`` times as many of the other classes with label 0."""
    is_member = torch.tensor([file.split("/")[0] == name for file in pictures.names])
    if not is_member.any():
        raise ValueError(f"there are no pictures of {name!r}; classes are the folders in the archives.")
    rest = (~is_member).nonzero()[:, 0]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[: others * int(is_member.sum())]]
    rows = torch.cat([is_member.nonzero()[:, 0], drawn])
    return pictures.select(rows)._replace(targets=is_member[rows].long())


def nine_tenths(targets: Tensor, seed: int) -> Tensor:
    """Rows of nine tenths of the pictures of each class, drawn by the seed: so that seeds differ in their pictures."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    members = [order[targets[order] == index] for index in range(int(targets.max()) + 1)]
    return torch.cat([rows[: -(-9 * len(rows) // 10)] for rows in members]).sort().values


def as_stored(features: Tensor) -> Tensor:
    """In the memory format of the model."""
    return features.contiguous(memory_format=torch.channels_last)
