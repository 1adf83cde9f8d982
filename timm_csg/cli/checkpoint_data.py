"""A trained model and the images to look at it with, for the commands that measure, report and explain."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import create_loader, resolve_data_config
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn
from torch.utils.data import IterableDataset

from timm_csg.cli.data import Digits, Loader, has_validation, open_split
from timm_csg.cli.data import class_names as names_of
from timm_csg.cli.distributed import find_device
from timm_csg.cli.images import CheckedImages, image_mode
from timm_csg.cli.options import DATA_OPTIONS
from timm_csg.cli.settings import DIGITS, TrainSettings, settings_of_run
from timm_csg.cli.spelling import did_you_mean
from timm_csg.hub import from_pretrained, parse_name
from timm_csg.hub_errors import HubError, explained
from timm_csg.labels import class_names
from timm_csg.manifest import CONFIG, CheckpointError, NoMechanismError, short

_logger = logging.getLogger(__name__)


class CheckpointAndData(NamedTuple):
    """What ``load_checkpoint_and_data`` returns.

    Attributes:
        model: In eval mode, on the device of the settings.
        loader: All validation images in order, as the model wants them.
        class_names: One name for each class of the model.
    """

    model: nn.Module
    loader: Loader
    class_names: list[str]


def check_data_options(options: Collection[str]) -> None:
    """Refuse options that say nothing of the data.

    Raises:
        ValueError: If there are any; the message lists the valid ones.
    """
    wrong = sorted(set(options) - set(DATA_OPTIONS))
    if wrong:
        raise ValueError(f"unknown option {', '.join(wrong)}; options of the data are {', '.join(DATA_OPTIONS)}.")


def settings_of(given: dict[str, Any], checkpoint: str) -> TrainSettings:
    """The data options that were given; those left out are what a ``timm-csg train`` run was made with, if it was.

    Raises:
        ValueError: If an option is wrong, or the settings of the run are damaged.
    """
    trained = run_settings(checkpoint)
    if trained is None:
        return TrainSettings(**given).resolved()
    asked = TrainSettings(**given).resolved()
    moved = asked.folder is not None and trained.folder is not None and asked.folder != trained.folder
    if "data" in given and not moved and asked.data != trained.resolved().data:
        return asked
    names = [*DATA_OPTIONS, "in_chans", "train_split"]
    settings = TrainSettings(**{name: getattr(trained, name) for name in names} | given).resolved()
    if moved and "val_fraction" not in given and has_validation(settings):
        settings = replace(settings, val_fraction=None, val_seed=None)
    return settings


def run_settings(checkpoint: str) -> TrainSettings | None:
    """The settings of the ``timm-csg train`` run that a checkpoint lies in; None if it lies in none."""
    folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        return None
    above = folder.resolve().parents[:2] if folder.resolve().name == "model" else ()
    found = (settings_of_run(candidate) for candidate in (folder, *above))
    return next((settings for settings in found if settings is not None), None)


def import_plugins(plugins: Sequence[str]) -> None:
    """Import Python files (``nets/mine.py``) or modules (``package.nets``), for what they register.

    Raises:
        ValueError: If there is no such file or module.
    """
    for plugin in plugins:
        path = Path(plugin).expanduser()
        if path.suffix != ".py":
            try:
                importlib.import_module(plugin)
            except ModuleNotFoundError as error:
                raise ValueError(f"--plugin {plugin} is not a module that can be imported: {error}.") from error
            continue
        if not path.is_file():
            raise ValueError(f"--plugin {plugin}: there is no such file.")
        if path.stem in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"--plugin {plugin} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses and pickling look their module up
        spec.loader.exec_module(module)


def load_model(checkpoint: str, device: torch.device | None = None) -> nn.Module:
    """A model with or without a mechanism, in eval mode.

    Args:
        checkpoint: A folder made by ``save_pretrained`` or ``timm-csg train`` (also the whole run), a plain timm
            folder, either with or without ``local-dir:``; a repository ``user/name`` or ``hf-hub:user/name``; or a name
            that timm knows, with its pretrained weights.
        device: Where to; None: the CPU.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is damaged.
        HubError: If the Hub cannot be reached or has no such repository.
        ValueError: If timm has no pretrained weights of that name.
    """
    folder = checkpoint_folder(checkpoint)
    try:
        model = _load(checkpoint, folder)
    except (CheckpointError, HubError) as error:
        alike = folder_spelled_alike(checkpoint) if folder is None else ""
        if not alike:
            raise
        raise type(error)(f"{str(error).rstrip('.')}{alike}") from error
    return model.eval().to(device if device is not None else torch.device("cpu"))


def _load(checkpoint: str, folder: Path | None) -> nn.Module:
    if folder is None and "/" not in checkpoint and is_model(checkpoint.partition(".")[0]):
        return _timm_model(checkpoint)
    try:
        return from_pretrained(checkpoint if folder is None else folder)
    except CheckpointError as error:
        if not isinstance(error, NoMechanismError) and not isinstance(error.__cause__, NoMechanismError):
            raise
        prefix = "" if checkpoint.startswith(("hf-hub:", "hf_hub:")) else "hf-hub:"
        return _timm_model(f"{prefix}{checkpoint}" if folder is None else f"local-dir:{folder}")


def check_local(checkpoint: str) -> None:
    """Load a checkpoint that no download can provide, for the error where it is missing or damaged.

    Raises:
        CheckpointError: If it is a folder without a readable model, or neither a folder nor a name for one.
    """
    if "/" not in checkpoint and is_model(checkpoint.partition(".")[0]):
        return
    if checkpoint_folder(checkpoint) is not None or parse_name(checkpoint, None)[0] is None:
        load_model(checkpoint)


def folder_spelled_alike(checkpoint: str) -> str:
    """The end of a sentence that offers a folder, or a timm model, whose name differs by a typo; empty if none does."""
    place = Path()
    parts = Path(checkpoint.removeprefix("local-dir:")).expanduser().parts
    for index, part in enumerate(parts):
        if not (place / part).exists():
            beside = [path.name for path in place.iterdir()] if place.is_dir() else []
            alike = difflib.get_close_matches(part, beside, n=1)
            whole = [str(Path(place, *alike, *parts[index + 1 :]))] if alike else []
            return did_you_mean(checkpoint, whole) or did_you_mean(checkpoint, list_models())
        place = place / part
    return ""


def _timm_model(name: str) -> nn.Module:
    """A plain model with its weights."""
    try:
        cfg = None if ":" in name else get_pretrained_cfg(name)
        if ":" not in name and (cfg is None or not cfg.has_weights):
            raise ValueError(f"timm has no pretrained weights of {name}; name a folder or another model.")
        with explained(f"load {name}"):
            model: nn.Module = timm.create_model(name, pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"timm cannot load {name}: {error}") from error
    return model


def checkpoint_folder(checkpoint: str) -> Path | None:
    """The checkpoint's folder; of a run the folder ``model`` in it. None if it is no folder."""
    folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        return None
    inner = folder / "model"
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def input_config(model: Any, settings: TrainSettings) -> dict[str, Any]:
    """Input size, normalisation and interpolation that the model wants; ``--img-size`` goes first."""
    in_chans = timm.models.get_model_input_config(model)["input_size"][0]
    args: dict[str, Any] = {"in_chans": in_chans, "img_size": settings.img_size}
    if in_chans == 1 and len(model.pretrained_cfg["mean"]) != 1:  # it still has that of the colour images
        args |= {"mean": (0.5,), "std": (0.5,)}
    config: dict[str, Any] = resolve_data_config(args, pretrained_cfg=model.pretrained_cfg)
    return config


def load_checkpoint_and_data(checkpoint: str, settings: TrainSettings) -> CheckpointAndData:
    """A model and the validation images of the settings, from one pass of ``timm.data`` without augmentation.

    Args:
        checkpoint: See ``load_model``.
        settings: Resolved; of them the fields in ``DATA_OPTIONS`` count.

    Returns:
        The model, the loader, and the names of the model's classes.

    Raises:
        CheckpointError, HubError, ValueError: See ``load_model``; also if the data is not found or has other classes.
    """
    device = find_device(settings.device)
    model = load_model(checkpoint, device)
    config = input_config(model, settings)
    if settings.data == DIGITS:
        dataset: Any = Digits(is_training=False)
        names, new_labels = match_classes(checkpoint, model, [str(digit) for digit in range(10)], settings)
    else:
        dataset = open_split(settings, is_training=False)
        found = names_of(dataset, settings, default=int(model.num_classes))  # type: ignore[arg-type]
        names, new_labels = match_classes(checkpoint, model, found, settings)
        if not isinstance(dataset, IterableDataset):
            mode = image_mode(config["input_size"][0])
            dataset = CheckedImages(dataset, len(names), mode=mode, new_labels=new_labels)
        elif new_labels is not None:
            raise ValueError(
                f"the classes of --data {settings.data} have another order than those of {checkpoint}, and a streaming "
                "data set cannot be relabelled; use image folders."
            )
    loader: Loader = create_loader(
        dataset,
        is_training=False,
        input_size=config["input_size"],
        batch_size=settings.batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0 if settings.data == DIGITS else config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        device=device,
        use_prefetcher=False,
        persistent_workers=False,
    )
    return CheckpointAndData(model, loader, names)


def match_classes(
    checkpoint: str, model: nn.Module, found: list[str], settings: TrainSettings
) -> tuple[list[str], list[int] | None]:
    """The names of a model's classes, and for each label of the data the model's own; None where they agree.

    Args:
        checkpoint: What the model was loaded from, for errors.
        model: Its classes count, where it has names.
        found: Names of the classes of the data, or their numbers.
        settings: What the data is called.

    Raises:
        ValueError: If the data has classes that the model has not, or, without names, another number of them.
    """
    own, count = class_names(model), int(model.num_classes)  # type: ignore[arg-type]
    known = own is not None and own != list(map(str, range(count)))
    if own is None or not known or found == list(map(str, range(len(found)))):
        if len(found) != count:
            raise ValueError(
                f"{checkpoint} has {count} classes, but --data {settings.data} has {len(found)}; use the data that the "
                "model was trained on, or one folder for each of its classes."
            )
        return (own if own is not None and known else found), None
    unknown, missing = sorted(set(found) - set(own)), sorted(set(own) - set(found))
    if unknown:
        raise ValueError(
            f"--data {settings.data} has classes that {checkpoint} does not know: {short(', '.join(unknown[:8]))}; its "
            f"own are {short(', '.join(own[:8]))}{', ...' if len(own) > 8 else ''}. Use images of these, in folders of "
            "the same names."
        )
    if missing:
        named = short(", ".join(missing[:8]))
        _logger.warning("there are no images of: %s; nothing is measured for these classes", named)
    return own, None if found == own else [own.index(name) for name in found]
