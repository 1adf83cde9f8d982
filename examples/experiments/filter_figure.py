"""Six filters of one animal, each with its strongest test pictures: after standard fine-tuning, and assigned.

python examples/experiments/filter_figure.py --data animalparts --weights local-dir:mobilenetv2 --cache frozen.pt \
    --output animal_filters.jpg

The filters are those of the animal by the assignment, evenly spaced in the order of their correlation: not chosen by
how they look. A blue frame: the picture shows that animal; an orange one: another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fine_tuning
import torch
from animal_pictures import read_pictures
from frozen_animals import Animals, choose, frozen_features, load_network, without_frozen_layers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rivals import pooled_responses
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import timm_csg

SIDE, FRAME, GAP, TOP = 92, 4, 6, 26


def filters_of(weights: str, animals: Animals, owner: int, number: int) -> list[int]:
    """So many of a class's filters, from the one that fits best before training to the one that fits least."""
    model = without_frozen_layers(load_network(weights, len(animals.classes)))
    found = timm_csg.assign_filters(timm_csg.differentiate(model, len(animals.classes)), animals.plain())
    own = found.matrix[owner].nonzero()[:, 0]
    order = own[found.correlations[owner, own].argsort(descending=True)]
    return order[torch.linspace(0, len(order) - 1, number).round().long()].tolist()


def draw(strongest: dict[str, Tensor], animals: Animals, pictures: dict[str, Tensor], owner: int) -> Image.Image:
    """A row for each filter, a block of columns for each network."""
    filters, count = next(iter(strongest.values())).shape
    step, block = SIDE + 2 * FRAME + 2, count * (SIDE + 2 * FRAME + 2) + 3 * GAP
    sheet = Image.new("RGB", (len(strongest) * block, TOP + filters * step), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, (title, rows) in enumerate(strongest.items()):
        pen.text((number * block + 2, 2), title, fill="black", font=font)
        for row, column in torch.cartesian_prod(torch.arange(filters), torch.arange(count)).tolist():
            index = int(rows[row, column])
            colour = (0, 114, 178) if animals.test_targets[index] == owner else (230, 126, 0)
            picture = ImageOps.fit(to_pil_image(pictures[animals.test_names[index]]), (SIDE, SIDE))
            place = (number * block + column * step, TOP + row * step)
            sheet.paste(ImageOps.expand(picture, FRAME, fill=colour), place)
    return sheet


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tar and test.tar")
    parser.add_argument("--weights", required=True, help="local-dir:FOLDER of a MobileNetV2 or EfficientNet of timm")
    parser.add_argument("--cache", type=Path, required=True, help="file of frozen features, as of fine_tuning.py")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--animal", default="lion")
    parser.add_argument("--filters", type=int, default=6)
    parser.add_argument("--pictures", type=int, default=3, help="for each filter")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    common = [
        "--data",
        str(args.data),
        "--weights",
        args.weights,
        "--cache",
        str(args.cache),
        "--epochs",
        str(args.epochs),
    ]
    animals = choose(frozen_features(args.weights, args.data, args.size, args.cache))
    owner, strongest = animals.classes.index(args.animal), {}
    filters = filters_of(args.weights, animals, owner, args.filters)
    for title, options in (("standard fine-tuning", ["--method", "standard", "--head-rate", "2e-3"]), ("assigned", [])):
        model, _ = fine_tuning.fine_tuned(animals, fine_tuning.parse([*common, *options]), rate=1e-3, seed=0)
        responses, _ = pooled_responses(model, animals.measured())
        strongest[title] = responses[:, filters].topk(args.pictures, dim=0).indices.T
    pictures, names = read_pictures(args.data / "test.tar")
    sheet = draw(strongest, animals, dict(zip(names, pictures, strict=True)), owner)
    sheet.save(args.output, quality=82, optimize=True)
    return strongest


if __name__ == "__main__":
    main()
