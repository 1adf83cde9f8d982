"""Owners without training: ``adapt`` against a dense linear probe, and its time against one pass over the pictures.

python examples/experiments/adapting.py --data animalparts --weights local-dir:mobilenetv2 --cache frozen.pt --time
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from animal_pictures import read_pictures
from frozen_animals import Animals, choose, frozen_features, load_network, without_frozen_layers
from owner_numbers import measure
from rivals import probe
from torchvision.transforms.v2.functional import resize

import timm_csg
from timm_csg.mechanisms import AssignedConfig


def accuracies(weights: str, animals: Animals, filters_per_class: list[int]) -> dict[str, dict]:
    """Numbers of the dense probe, of ``adapt`` with all filters, and with so many of each class."""
    classes = len(animals.classes)
    model = without_frozen_layers(load_network(weights, classes))
    probe(model, animals.plain(), classes, None)
    found = {"probe": measure(model.eval(), animals)}
    for filters in (None, *filters_per_class):
        model = without_frozen_layers(load_network(weights, classes))
        timm_csg.differentiate(model, classes, mechanism=AssignedConfig(filters_per_class=filters))
        timm_csg.adapt(model, animals.plain())
        found["all filters" if filters is None else f"{filters} a class"] = measure(model.eval(), animals)
    return found


def times(weights: str, data: Path, size: int, every: int) -> dict[str, float]:
    """Seconds of processor time: one pass of the whole network over the training pictures, and ``adapt`` on them."""
    pictures, names = read_pictures(data / "train.tar")
    classes = sorted({name.split("/")[0] for name in names})
    targets = torch.tensor([classes.index(name.split("/")[0]) for name in names])[::every]
    pixels = torch.stack([resize(picture, [size, size], antialias=True) for picture in pictures[::every]])
    batches = list(zip(pixels.split(64), targets.split(64), strict=True))
    model = timm_csg.differentiate(load_network(weights, len(classes)), len(classes)).eval()
    found = {}
    for name in ("evaluation", "adapt"):
        loader = ((images.float() / 127.5 - 1, labels) for images, labels in batches)
        start = time.process_time()
        if name == "adapt":
            timm_csg.adapt(model, loader)
        else:
            with torch.inference_mode():
                sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in loader)
        found[name] = time.process_time() - start
    return found | {"ratio": found["adapt"] / found["evaluation"]}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tar and test.tar")
    parser.add_argument("--weights", required=True, help="local-dir:FOLDER of a MobileNetV2 or EfficientNet of timm")
    parser.add_argument("--cache", type=Path, required=True, help="file of frozen features, as of fine_tuning.py")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--filters-per-class", type=int, nargs="+", default=[20, 5])
    parser.add_argument("--time", action="store_true", help="also the times, with the whole network")
    parser.add_argument("--every", type=int, default=1, help="time only every so many-th picture")
    args = parser.parse_args(arguments)
    animals = choose(frozen_features(args.weights, args.data, args.size, args.cache))
    found: dict = accuracies(args.weights, animals, args.filters_per_class)
    for name, numbers in found.items():
        print(name, {key: round(value, 4) for key, value in numbers.items()}, flush=True)
    if args.time:
        found["seconds"] = times(args.weights, args.data, args.size, args.every)
        print(json.dumps(found["seconds"]))
    return found


if __name__ == "__main__":
    main()
