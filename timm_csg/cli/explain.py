"""``timm-csg explain``: pictures of where a model looked, and a table of the filters behind its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image
from rich import box
from rich.table import Table
from timm.data import create_transform
from torch import Tensor, nn

from timm_csg import explain as methods_module
from timm_csg.checkpoint import replacing
from timm_csg.cli.checkpoint_data import import_plugins, input_config, load_model, match_classes, run_settings
from timm_csg.cli.commands.explain import FILTERS, METHODS, OPTIONS
from timm_csg.cli.data import class_names as names_of
from timm_csg.cli.data import open_split
from timm_csg.cli.distributed import find_device
from timm_csg.cli.settings import DIGITS, TrainSettings
from timm_csg.explain import PredictionExplanation
from timm_csg.labels import class_names
from timm_csg.plots import overlay
from timm_csg.plots.report.pictures import displayable

_SMALLEST = 256  # pixels of a picture's longer side; smaller images are enlarged
_DIGITS = [str(digit) for digit in range(10)]


class Explained(NamedTuple):
    """What ``explain`` found out about one image.

    Attributes:
        image: The file.
        why: The filters behind the answer.
        answer: Name of the explained class.
        pictures: The files that were written.
    """

    image: Path
    why: PredictionExplanation
    answer: str
    pictures: list[Path]


def explain(
    images: Sequence[str | Path],
    checkpoint: str,
    *,
    methods: Sequence[str] = ("grad_cam",),
    target: str | int | None = None,
    top: int = 5,
    output: str | Path | None = "explained",
    plugins: Sequence[str] = (),
    **data_options: Any,
) -> list[Explained]:
    """Say why images are given their class; what ``timm-csg explain`` calls.

    Args:
        images: Picture files.
        checkpoint: See ``timm_csg.cli.report.report``.
        methods: Which maps to draw: names of ``timm_csg.explain``, and ``"filters"`` for the map of each filter that is
            named in the explanation.
        target: Name or index of the class to explain; None: the predicted one.
        top: Filters for each image.
        output: Folder for the pictures, one for each image and map; None: none are written.
        plugins: Python files or modules to import first.
        **data_options: ``img_size`` and ``device``; and ``data``, ``data_dir``, ``val_split``, ``num_classes``, where
            the class names are read from if the checkpoint has none; if given, it must have no other classes. Left
            out: those of the run that the checkpoint lies in.

    Returns:
        What was found out about each image.

    Raises:
        ValueError: If an option is wrong, or a method does not apply to the model; the message names another one.
        CheckpointError, HubError: If the checkpoint cannot be loaded.
        OSError: If a picture cannot be read.
    """
    unknown = [name for name in methods if name not in METHODS and name != FILTERS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; known are {', '.join([*METHODS, FILTERS])}.")
    wrong = sorted(set(data_options) - set(OPTIONS))
    if wrong:
        raise ValueError(f"unknown option {', '.join(wrong)}; options are {', '.join(OPTIONS)}.")
    import_plugins(plugins)
    trained = run_settings(checkpoint)
    kept = {} if trained is None else {name: getattr(trained, name) for name in (*OPTIONS, "in_chans")}
    settings = TrainSettings(**kept | data_options)
    if settings.data == DIGITS and (trained is not None or "data" in data_options):
        settings = settings.resolved()
    model = load_model(checkpoint, find_device(settings.device))
    has_data = trained is not None or "data" in data_options
    names = class_names(model)
    if "data" in data_options or (names is None and has_data):
        names = _names_in_data(checkpoint, model, settings, must="data" in data_options)
    names = _numbers(model) if names is None else names
    label = None if target is None else _class_index(target, names)
    found = []
    for number, path in enumerate(map(Path, images)):
        image = _read(path, model, settings, whole=settings.data == DIGITS and has_data)
        why = methods_module.explain_prediction(model, image, label, top=top)[0]
        taken = any(Path(other).stem == path.stem for other in images[:number])
        stem = f"{path.stem}-{number + 1}" if taken else path.stem
        written = [] if output is None else _draw(model, image, why, methods, Path(output), stem)
        found.append(Explained(path, why, names[why.target], written))
    return found


def _numbers(model: nn.Module) -> list[str]:
    return [str(index) for index in range(int(model.num_classes))]  # type: ignore[arg-type]


def _names_in_data(checkpoint: str, model: nn.Module, settings: TrainSettings, *, must: bool) -> list[str] | None:
    """Names of the classes, compared with those of the data; None where it is not at hand and need not be."""
    try:
        names = _DIGITS if settings.data == DIGITS else names_of(open_split(settings, is_training=False), settings)
    except ValueError:
        if must:
            raise
        return None
    return match_classes(checkpoint, model, names, settings)[0]


def _class_index(target: str | int, names: list[str]) -> int:
    text = str(target)
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ValueError(f"there is no class {text!r}; the model has {', '.join(names[:12])}{', ...' * (len(names) > 12)}.")


def _read(path: Path, model: nn.Module, settings: TrainSettings, *, whole: bool) -> Tensor:
    """One image as the model wants it [1, channels, height, width]."""
    config = input_config(model, settings)
    transform: Any = create_transform(
        input_size=config["input_size"],
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0 if whole else config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    with Image.open(path) as picture:
        image: Tensor = transform(picture.convert("L" if config["input_size"][0] == 1 else "RGB"))
    return image[None].to(next(model.parameters()).device)


def _draw(
    model: nn.Module, image: Tensor, why: PredictionExplanation, methods: Sequence[str], folder: Path, stem: str
) -> list[Path]:
    """One picture for each map."""
    maps: dict[str, Tensor] = {}
    for name in methods:
        if name == FILTERS:
            maps |= {f"filter{found.filter}": found.map for found in why.filters if found.map is not None}
        else:
            heat = getattr(methods_module, name)(model, image, why.target)[0]
            maps[name] = heat if heat.ndim == 2 else heat.abs().amax(dim=0)
    pixels = displayable(image[0].cpu(), model)
    larger = _SMALLEST / max(pixels.shape[1:])
    if larger > 1:
        size = [round(side * larger) for side in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, heat in maps.items():
        path = folder / f"{stem}_{name}.png"
        with replacing(path) as temporary:
            overlay(pixels, heat.cpu()).save(temporary, format="PNG")
        written.append(path)
    return written


def explanation_table(found: list[Explained], title: str = "") -> Table:
    """Why each image was given its class: its filters, what they own, and how much of the evidence they gave."""
    table = Table(title=f"Why, by {title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("image", "class"):
        table.add_column(name, overflow="fold")
    for name in ("sure", "filter", "gate", "response", "gives", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        owned = each.why.standard.owned_share
        for place, evidence in enumerate(each.why.filters):
            first = place == 0
            table.add_row(
                each.image.name if first else "",
                each.answer if first else "",
                f"{each.why.probability:.1%}" if first else "",
                str(evidence.filter),
                "–" if evidence.gate is None else f"{evidence.gate:.2f}",
                f"{evidence.activation:.3g}",
                f"{evidence.contribution:+.2f}",
                f"{evidence.share:.1%}",
            )
        if owned is not None:
            table.add_row("", "", "", "all its own", "", "", "", f"{owned:.1%}", style="bold")
        table.add_section()
    notes = [
        "sure: probability of the class.  gives: what the filter adds to the score of the class.",
        "share: of everything that speaks for the class in this image.",
    ]
    if any(not each.why.standard.exact for each in found):
        notes.append("The head of this model is not linear: gives and share are estimates, gradient times response.")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table
