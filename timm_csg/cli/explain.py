"""``timm-csg explain``: pictures of where a model looked, and a table of the filters behind its answers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg import explain as methods_module
from timm_csg import labels
from timm_csg.checkpoint import replacing
from timm_csg.checks import check_choice, nearest
from timm_csg.cli.checkpoints import check_data_options, load_with_input
from timm_csg.cli.classes import class_names, match_classes
from timm_csg.cli.commands.explain import FILTERS, METHODS
from timm_csg.cli.data import open_split
from timm_csg.cli.preprocessing import read_input
from timm_csg.cli.runs import file_stem, folder_for_results
from timm_csg.cli.settings import IMAGE_OPTIONS, TrainSettings
from timm_csg.explain import Contrast, PredictionExplanation
from timm_csg.pictures import ImageError, find_pictures, shown
from timm_csg.plots import contrast_figure, overlay
from timm_csg.plots.reporting.pictures import displayable

_logger = logging.getLogger(__name__)
_SMALLEST = 256  # pixels of a picture's longer side; smaller images are enlarged


class Explained(NamedTuple):
    """What ``explain`` found out about one image.

    Attributes:
        image: The file.
        why: The filters behind the answer; it names the classes.
        pictures: The files that were written.
        versus: What decides between its class and another one that was named.
    """

    image: Path
    why: PredictionExplanation
    pictures: list[Path]
    versus: Contrast | None = None

    @property
    def answer(self) -> str:
        """Name of the explained class."""
        return self.why.name(self.why.target if self.versus is None else self.versus.classes[0])


def explain(
    images: Sequence[str | Path],
    checkpoint: str,
    *,
    methods: Sequence[str] = ("grad_cam",),
    target: str | int | None = None,
    against: str | int | None = None,
    top: int = 5,
    output: str | Path | None = "explained",
    progress: Callable[[Path], None] | None = None,
    **data_options: Any,
) -> list[Explained]:
    """Say why images are given their class; what ``timm-csg explain`` calls.

    Args:
        images: Picture files, and folders of them.
        checkpoint: See ``timm_csg.cli.report.report``.
        methods: Which maps to draw: names of ``timm_csg.explain``, and ``"filters"`` for the map of each filter that is
            named in the explanation.
        target: Name or index of the class to explain; None: the predicted one.
        against: Another class, to say what decides between the two, with a figure; see ``timm_csg.explain.contrast``.
        top: Filters for each image, 1 or more.
        output: Folder for the pictures, one for each image and map; None: none are written.
        progress: Called with each file before it is read.
        **data_options: ``img_size`` and ``device``; and ``data``, ``data_dir``, ``val_split``, ``num_classes``, where
            the class names are read from if the checkpoint has none; if given, it must have no other classes. Left
            out: those of the run that the checkpoint lies in.

    Returns:
        What was found out about each image. Pictures that cannot be read are named in the log and left out.

    Raises:
        ValueError: If an option is wrong, a method does not apply to the model (the message names another one), or no
            picture can be read.
        CheckpointError, HubError: If the checkpoint cannot be loaded.
    """
    if not methods:
        raise ValueError(f"no method is named; there are {', '.join([*METHODS, FILTERS])}.")
    for name in methods:
        check_choice("--method", name, (*METHODS, FILTERS))
    if top < 1:
        raise ValueError(f"--top must be at least 1, but is {top}.")
    check_data_options(data_options, IMAGE_OPTIONS)
    files = list(_files(images))
    model, config, settings = load_with_input(checkpoint, data_options)
    names = _class_names(checkpoint, model, settings, must_fit="data" in data_options)
    label = None if target is None else labels.class_index(target, names)
    rival = None if against is None else labels.class_index(against, names)
    pictures = None if output is None else _Pictures(Path(output))

    def one(path: Path) -> Explained:
        image = read_input(path, config).to(next(model.parameters()).device)
        why = replace(methods_module.explain_prediction(model, image, label, top=top)[0], class_names=names)
        versus = None if rival is None else _versus(model, image, why, rival, top)
        if pictures is None:
            return Explained(path, why, [], versus)
        pixels, maps = _pixels(model, image), _maps(model, image, why, methods)
        drawn: dict[str, Any] = {name: overlay(pixels, heat.cpu()).save for name, heat in maps.items()}
        if versus is not None:
            drawn["versus"] = partial(_contrast_figure(versus, pixels, names).savefig, dpi=150)
        return Explained(path, why, pictures.save(drawn, path.stem), versus)

    with nullcontext() if output is None else folder_for_results(Path(output)):
        return _all_that_can_be_read(one, files, progress)


def _versus(model: nn.Module, image: Tensor, why: PredictionExplanation, against: int, top: int) -> Contrast:
    """What decides between the explained class and another one.

    Args:
        model: The model.
        image: [1, channels, height, width].
        why: The class that is explained; where it is ``against`` itself, the most probable other class takes its place.
        against: The other class.
        top: Filters, as many as there are at most.
    """
    one = why.target
    if one == against:
        logits: Any = model(image).detach()[0]
        logits[against] = -float("inf")
        one = int(logits.argmax())
    return methods_module.contrast(model, image, one, against, top=min(top, int(model.num_features)))  # type: ignore[arg-type]


def _all_that_can_be_read(
    one: Callable[[Path], Explained], files: Sequence[Path], progress: Callable[[Path], None] | None
) -> list[Explained]:
    """Explain every picture; one that is damaged is named and does not keep the others from being explained."""
    found, errors = [], []
    for path in files:
        if progress is not None:
            progress(path)
        try:
            found.append(one(path))
        except ImageError as error:
            errors.append(error)
            if len(files) > 1:
                _logger.warning("%s", error)
    if not found and errors:
        raise errors[0]
    return found


def _files(images: Sequence[str | Path]) -> Iterator[Path]:
    """The picture files, those in folders included.

    Raises:
        ValueError: If a file does not exist, or a folder holds no pictures.
    """
    for path in (Path(image).expanduser() for image in images):
        if not path.is_dir():
            if not path.exists():
                beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
                raise ValueError(f"{shown(str(path))} does not exist.{nearest(path.name, beside)}")
            yield path
            continue
        found = find_pictures(path)
        found.say_what_is_ignored(path)
        if not found.pictures:
            raise ValueError(f"{shown(str(path))} contains no pictures.")
        yield from (path / picture for pictures in found.pictures.values() for picture in pictures)


def _class_names(checkpoint: str, model: nn.Module, settings: TrainSettings | None, *, must_fit: bool) -> list[str]:
    """Names of the model's classes: its own, else those of the data, else numbers; the data has no others if named."""
    own = labels.class_names(model)
    if settings is not None and (must_fit or own is None):
        try:
            found = class_names(open_split(settings, is_training=False), settings)
            return match_classes(checkpoint, model, found, settings)[0]
        except ValueError as error:
            if must_fit:
                raise
            _logger.warning("classes are shown by number: %s", error)
    return own or [str(index) for index in range(int(model.num_classes))]  # type: ignore[arg-type]


class _Pictures:
    """Writes the pictures of one image after another, never two of them to one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: set[str] = set()  # in lower case, as some file systems have it

    def save(self, drawn: dict[str, Callable[..., Any]], stem: str) -> list[Path]:
        """Write pictures, each by a function that saves it, under names that end with its key; the files."""
        stem = file_stem(stem)
        for number in itertools.count(1):
            numbered = stem if number == 1 else f"{stem}-{number}"
            files = [self.folder / f"{numbered}_{name}.png" for name in drawn]
            if not self.taken & {file.name.lower() for file in files}:
                break
        self.taken |= {file.name.lower() for file in files}
        for file, save in zip(files, drawn.values(), strict=True):
            with replacing(file) as temporary:
                save(temporary, format="png")
        return files


def _maps(model: nn.Module, image: Tensor, why: PredictionExplanation, methods: Sequence[str]) -> dict[str, Tensor]:
    maps: dict[str, Tensor] = {}
    for name in methods:
        if name == FILTERS:
            maps |= {f"filter{found.filter}": found.map for found in why.filters if found.map is not None}
        else:
            heat = getattr(methods_module, name)(model, image, why.target)[0]
            maps[name] = heat if heat.ndim == 2 else _seen(heat.abs().amax(dim=0))
    return maps


def _seen(pixels: Tensor) -> Tensor:
    """A map of single pixels [height, width] without its few largest values, beside which no other could be seen."""
    return pixels.clamp(max=float(pixels.float().quantile(0.99)))


def _contrast_figure(versus: Contrast, pixels: Tensor, names: Sequence[str]) -> Any:
    maps = versus.maps
    if maps is not None:
        maps = F.interpolate(maps.cpu(), size=pixels.shape[1:], mode="bilinear", align_corners=False)
    return contrast_figure(pixels[None], versus._replace(maps=maps), names=names)


def _pixels(model: nn.Module, image: Tensor) -> Tensor:
    """The image as it was before normalisation [3 or 1, height, width], enlarged if it is small."""
    pixels = displayable(image[0].cpu(), model)
    larger = _SMALLEST / max(pixels.shape[1:])
    if larger <= 1:
        return pixels
    size = [round(side * larger) for side in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
