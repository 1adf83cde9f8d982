"""Folders of tiny pictures as people have them, for tests."""

import numpy as np
from PIL import Image

from timm_csg.cli import main

SMALL = ["--model", "test_resnet", "--img-size", "32", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
SMALL += ["--device", "cpu", "--warmup-epochs", "0"]


def picture(seed=0, size=(24, 20)):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 215, 3) + random.integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def fill(folder, count=4, suffix="png", seed=0):
    """Pictures 0.png, 1.png, ... in a folder; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(seed + index).save(folder / f"{index}.{suffix}")
    return folder


def make_splits(root, names, train=4, validation=3):
    """Folders train/ and val/ with classes of these names; the root."""
    for split, count in (("train", train), ("val", validation)):
        for place, name in enumerate(names):
            fill(root / split / name, count, seed=1000 * place + 500 * (split == "val"))
    return root


def train(data, output, *arguments):
    """Train one epoch; the exit status."""
    return main(["train", "--data", str(data), "--output", str(output), *SMALL, *map(str, arguments)])
