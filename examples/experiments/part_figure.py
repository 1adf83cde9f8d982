"""The same filters of an ordinary net and of an ICNN, each on its six strongest pictures, with the mask drawn.

python examples/experiments/part_figure.py runs/standard runs/icnn --data animalparts --output parts.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from animal_pictures import RESIZE, SIZE, crop_objects, read_pictures
from torch import Tensor, nn

import timm_csg
from timm_csg import measuring
from timm_csg.measuring.fields import receptive_field
from timm_csg.mechanisms.templates import part_template
from timm_csg.metrics.instability import peak_places


@torch.inference_mode()
def strongest_places(model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean response [pictures, filters] and where it peaks, x and y in pixels [pictures, filters, 2].

    Pictures are ranked by the mean, since peaks are equal wherever a ReLU6 cuts them off.
    """
    field, found = receptive_field(model, SIZE), []
    for part in pictures.split(50):
        features = model.forward_features(part.float() / 127.5 - 1)
        seen = model.mechanism(features) if hasattr(model, "mechanism") else features
        found.append((seen.mean(dim=(2, 3)), peak_places(seen, field.centre_y, field.centre_x)[1]))
    strength, place = (torch.cat(column) for column in zip(*found, strict=True))
    return strength, place


def one_per_class(strength: Tensor, targets: Tensor, filters: int) -> list[int]:
    """For the classes with the most filters, the one with the largest mean response: not chosen by how it looks."""
    means = torch.stack([strength[targets == index].mean(dim=0) for index in range(int(targets.max()) + 1)])
    owner = means.argmax(dim=0)
    classes = torch.bincount(owner, minlength=len(means)).argsort(descending=True)[:filters]
    return [int(torch.where(owner == index, means[index], -1.0).argmax()) for index in classes]


def draw(axes: plt.Axes, picture: Tensor, place: Tensor, *, beta: float, colour: str) -> None:
    """A picture, its part behind the mask bright and outlined, the rest dimmed."""
    column, row = place.round().long()
    mask = part_template(row, column, *picture.shape[1:], beta).clamp(min=0)
    axes.imshow(picture.permute(1, 2, 0).float() / 255 * (0.45 + 0.55 * (mask > 0)[..., None]))
    axes.contour(mask, levels=[1e-6], colors=colour, linewidths=1.2)
    axes.set(xticks=[], yticks=[])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("standard", help="folder of the ordinary net")
    parser.add_argument("icnn", help="folder of the ICNN")
    parser.add_argument("--data", type=Path, required=True, help="folder of test.tar and annotations.csv")
    parser.add_argument("--objects", action="store_true", help="cut the main object out of every picture")
    parser.add_argument("--filters", type=int, default=6)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    raw, names = read_pictures(args.data / "test.tar")
    if args.objects:
        raw, _ = crop_objects(raw, measuring.read_annotations(args.data / "annotations.csv").select(names))
    pictures, folders = torch.stack([RESIZE(picture) for picture in raw]), [name.split("/")[0] for name in names]
    targets = torch.tensor([sorted(set(folders)).index(folder) for folder in folders])
    after = timm_csg.from_pretrained(args.icnn)
    before = timm.create_model(f"local-dir:{args.standard}", pretrained=True)
    found = [strongest_places(model.eval(), pictures) for model in (before, after)]
    chosen, beta = one_per_class(found[1][0], targets, args.filters), after.mechanism.config.beta
    size, widths = (13, args.filters * 1.06), [*[1] * 6, 0.2, *[1] * 6]
    figure, grid = plt.subplots(args.filters, 13, figsize=size, width_ratios=widths)
    for line, index in zip(grid, chosen, strict=True):
        for side, (strength, place) in enumerate(found):
            for axes, image in zip(line[7 * side :], strength[:, index].topk(6).indices, strict=False):
                draw(axes, pictures[image], place[image, index], beta=beta, colour=("orange", "lime")[side])
        line[6].axis("off")
        line[0].set_ylabel(f"filter {index}", fontsize=7)
    for column, title in ((2, "ordinary fine-tuning"), (9, "ICNN")):
        grid[0, column].set_title(title, fontsize=9)
    figure.subplots_adjust(0.02, 0.005, 0.998, 0.955, wspace=0.03, hspace=0.03)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=85)


if __name__ == "__main__":
    main()
