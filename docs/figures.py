"""Draws the figures of the documentation from what is in the repository; mkdocs runs it before it builds the pages.

``python docs/figures.py`` draws them too. The checkpoint is examples/cifar10_resnet20_assigned, the pictures are eight
test pictures of CIFAR-10 (A. Krizhevsky, 2009) in one small file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import timm_csg
from timm_csg import explain
from timm_csg.plots import contrast_figure, map_figure

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
MADE = DOCS / "images" / "made"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def on_startup(**kwargs: Any) -> None:
    """Called by mkdocs once, before it looks for files."""
    draw()


def draw() -> list[Path]:
    """Draw every figure; returns the files."""
    MADE.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(EXAMPLES))
    try:
        _example("cifar_resnet20")  # registers the architecture
        model = timm_csg.from_pretrained(EXAMPLES / "cifar10_resnet20_assigned")
        pictures = _pictures()
        figures = {
            "explanations.png": _explanations(model, pictures),
            "filters.png": _filters(model, pictures),
            "contrast.png": _contrast(model, pictures),
        }
        for name, figure in figures.items():
            figure.savefig(MADE / name, dpi=110)
        with contextlib.redirect_stdout(io.StringIO()):
            _example("factor_maps").main(["--epochs", "25", "--output", str(MADE)])
    finally:
        sys.path.remove(str(EXAMPLES))
    return [MADE / name for name in (*figures, "factors.png")]


def _example(name: str) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{EXAMPLES / name}.py cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _pictures() -> Tensor:
    """Pictures [8, 3, 32, 32] in [0, 1], side by side in the file."""
    sheet = torch.from_numpy(np.array(Image.open(DOCS / "images" / "cifar10_pictures.png"))).permute(2, 0, 1)
    return torch.stack(sheet.split(32, dim=2)).float() / 255


def _normalised(model: torch.nn.Module, pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pictures - mean) / std


def _explanations(model: torch.nn.Module, pictures: Tensor) -> Any:
    images = _normalised(model, pictures)
    gradients = {name: getattr(explain, name)(model, images) for name in ("gradient", "deconvnet", "guided_backprop")}
    columns: dict[str, Any] = {"picture": pictures}
    columns["CAM"] = (pictures, explain.cam(model, images))
    columns["Grad-CAM"] = (pictures, explain.grad_cam(model, images))
    columns["gated"] = (pictures, explain.grad_cam(model, images, path="gated"))
    columns["coarse map"] = (pictures, explain.coarse_map(model, images))
    for name, value in gradients.items():
        columns[name.replace("_", " ")] = _signed(value)
    return map_figure(columns)


def _signed(gradient: Tensor) -> Tensor:
    """A gradient as a picture: grey is 0, scaled by its 99.5 % quantile."""
    scale = gradient.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1e-12)
    return 0.5 + gradient / scale.view(-1, 1, 1, 1) / 2


def _filters(model: torch.nn.Module, pictures: Tensor) -> Any:
    """For each picture the three filters of its class that gave most."""
    why = explain.explain_prediction(model, _normalised(model, pictures), top=3)
    columns: dict[str, Any] = {"picture": pictures}
    for place, name in enumerate(("strongest", "second", "third")):
        maps = [one.filters[place].map if place < len(one.filters) else torch.zeros(32, 32) for one in why]
        columns[name] = (pictures, torch.stack(maps))
    figure = map_figure(columns, size=1.5)
    for row, one in enumerate(why):
        for place, filter_ in enumerate(one.filters[:3]):
            text = f"{filter_.filter}: {filter_.share:.0%} of {CLASSES[one.target]}"
            figure.axes[row * len(columns) + place + 1].set_title(text, fontsize=7)
        figure.axes[row * len(columns)].set_title(f"{CLASSES[one.target]} {one.probability:.0%}", fontsize=7)
    return figure


def _contrast(model: torch.nn.Module, pictures: Tensor) -> Any:
    """A dog and a horse: what decides between the two classes."""
    two = pictures[2:4]
    return contrast_figure(two, explain.contrast(model, _normalised(model, two), "dog", "horse", top=4), names=CLASSES)


if __name__ == "__main__":
    draw()
