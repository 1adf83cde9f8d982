"""Nets small enough to compute by hand, with the methods of a timm classifier."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class TinyNet(nn.Module):
    """1x1 conv → ReLU → max pooling of two columns → 1x1 conv → ReLU | mean → linear; ``relu`` says how it is written.

    The expected numbers for ``picture`` are worked out in the tests.
    """

    num_classes, num_features, output_fmt = 2, 2, "NCHW"

    def __init__(self, relu="module"):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        self.fc = nn.Linear(2, 2)
        self.act = nn.ReLU6(inplace=True) if relu == "relu6" else nn.ReLU(inplace=relu == "module in place")
        self.relu = {
            "functional": F.relu,
            "torch": torch.relu,
            "method": lambda maps: maps.relu(),
            "functional in place": lambda maps: F.relu(maps, inplace=True),
            "threshold": lambda maps: F.threshold(maps, 0.0, 0.0),
            "clamp": lambda maps: maps.clamp(min=0),
            "silu": F.silu,
            "hand-written silu": lambda maps: maps * maps.sigmoid(),
            "mixed": lambda maps: F.relu(maps) if maps.shape[3] == 2 else F.gelu(maps),
            "leaky": lambda maps: F.leaky_relu(maps, 0.1),
            "none": lambda maps: maps * 1,
            "in place on a part": in_place_on_a_part,
        }.get(relu, self.act)
        with torch.no_grad():
            self.conv1.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.conv2.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 1.0]]).view(2, 2, 1, 1))
            self.fc.weight.copy_(torch.tensor([[2.0, -1.0], [-1.0, 3.0]]))
            self.fc.bias.copy_(torch.tensor([0.25, -9.0]))

    def forward_features(self, images):
        return self.relu(self.conv2(F.max_pool2d(self.relu(self.conv1(images)), (1, 2))))

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool=None):
        self.fc = nn.Linear(2, num_classes)


def in_place_on_a_part(maps):
    """What the autograd graph hides: a ReLU that works in place on a slice, and an in-place sum."""
    maps = maps * 1
    maps[:, :1].relu_()
    maps[:, 1:].relu_()
    return maps


@pytest.fixture
def tiny_net():
    return lambda relu="module": TinyNet(relu).eval()


@pytest.fixture
def picture():
    return torch.tensor([[[[1.0, -2.0], [3.0, -1.0]]]])
