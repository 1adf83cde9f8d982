"""A model that tells colours apart, and pictures that it knows."""

import pytest
import torch
from torch import nn


@pytest.fixture
def colours():
    """Class c is the mean of channel c, times 9: nine classes, no parameter needs training."""
    model = nn.Sequential(nn.Conv2d(9, 9, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(9 * torch.eye(9)[:, :, None, None])
    return model


@pytest.fixture
def pictures():
    """Two pictures of each colour [18, 9, 6, 6], some noise on them, and their classes."""
    targets = torch.arange(18) % 9
    noise = 0.2 * torch.randn(18, 9, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.eye(9)[targets][:, :, None, None] + noise, targets


@pytest.fixture
def own_colour():
    """The perfect explanation of that model."""

    def explain(model, images, targets):
        return images[torch.arange(len(images)), targets]

    return explain
