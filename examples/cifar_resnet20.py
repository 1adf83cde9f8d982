"""ResNet20 for CIFAR (He et al., 2016, section 4.2) as a timm model, and CIFAR-10 in memory.

Importing this file registers the model, so that ``timm.create_model("resnet20_cifar")`` and checkpoints of it load.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn


class CifarResNet(ResNet):
    """timm's ResNet with three stages, a 3x3 stem and no max pooling: 32x32 images end in 8x8 maps of 64 filters."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, stem_width=8, stem_type="deep")
        self.conv1 = nn.Conv2d(kwargs.get("in_chans", 3), 16, 3, padding=1, bias=False)
        self.maxpool, self.layer4 = nn.Identity(), nn.Identity()


default_cfgs = generate_default_cfgs(
    {
        "resnet20_cifar": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet20: 3 blocks in each of 3 stages of 16, 32 and 64 filters."""
    settings = {"block": BasicBlock, "layers": (3, 3, 3), "channels": (16, 32, 64)} | kwargs
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, **settings)


def load_cifar(path: str, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and classes [N] from an .npz of encoded pictures; split is "train" or "test"."""
    archive = np.load(path)
    data, offset = archive[f"{split}_data"].tobytes(), archive[f"{split}_offset"]
    decode = lambda start, stop: np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))  # noqa: E731
    images = np.stack([decode(start, stop) for start, stop in pairwise(offset)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(archive[f"{split}_label"]).long()


class Batches:
    """Batches of images in memory, shuffled, cropped (4 pixels of padding) and flipped where ``is_training``.

    Everything happens on the device of the images.
    """

    def __init__(self, images: Tensor, targets: Tensor, batch_size: int, *, is_training: bool) -> None:
        cfg, device = default_cfgs["resnet20_cifar"].default, images.device
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
        self.images, self.targets, self.batch_size, self.is_training = images, targets, batch_size, is_training

    def __len__(self) -> int:
        return len(self.images) // self.batch_size if self.is_training else -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        place = torch.randperm if self.is_training else torch.arange
        for index in place(len(self.images), device=device).split(self.batch_size)[: len(self)]:
            images = (self.images[index].float() / 255 - self.mean) / self.std
            if self.is_training:
                padded, count = nn.functional.pad(images, (4, 4, 4, 4)), len(images)
                row, column = torch.randint(0, 9, (2, count, 1), device=device) + torch.arange(32, device=device)
                number = torch.arange(count, device=device)[:, None, None]
                images = padded[number, :, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)
                images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, images.flip(3), images)
            yield images.contiguous(memory_format=torch.channels_last), self.targets[index]
