"""A data set of coloured squares, and class names that try to get out of the page."""

import torch

CLASS_NAMES = ["red", "green", "<script>alert('blue')</script>", 'grey & "dark"']


def coloured(count, seed):
    """Images [count, 3, 32, 32] whose class is the colour of a square somewhere; normalised as timm's test_resnet."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 4
    images = 0.1 * torch.rand(count, 3, 32, 32, generator=generator)
    for image, label in zip(images, targets.tolist(), strict=True):
        row, column = torch.randint(0, 20, (2,), generator=generator).tolist()
        channels = [label] if label < 3 else [0, 1, 2]
        image[channels, row : row + 12, column : column + 12] += 0.8 if label < 3 else 0.3
    return (images.clamp(0, 1) - 0.5) / 0.5, targets


def batches(images, targets, size=32):
    return list(zip(images.split(size), targets.split(size), strict=True))
