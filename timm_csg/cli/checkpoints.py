"""A model by whatever names it (timm, a folder, a run, the Hub), and the images to look at it with."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn
from torch.utils.data import IterableDataset

from timm_csg.checks import nearest
from timm_csg.cli.classes import class_names, match_classes
from timm_csg.cli.data import has_validation, open_split
from timm_csg.cli.distributed import find_device
from timm_csg.cli.images import CheckedImages
from timm_csg.cli.preprocessing import Loader, make_loader, model_input_config
from timm_csg.cli.runs import RunFolder
from timm_csg.cli.settings import DATA_OPTIONS, TrainSettings
from timm_csg.hub import from_pretrained, parse_name
from timm_csg.hub_errors import HubError, explained
from timm_csg.manifest import CONFIG, CheckpointError, NoMechanismError, folder_named
from timm_csg.pictures import image_mode


class Opened(NamedTuple):
    """What ``open_checkpoint`` returns.

    Attributes:
        model: In eval mode, on the CPU; without a mechanism and without weights on the meta device.
        source: ``"timm"``, ``"plain checkpoint"`` or ``"checkpoint"``, which has a mechanism.
        timm_name: What ``timm.create_model`` calls it.
    """

    model: nn.Module
    source: str
    timm_name: str


def load_model(checkpoint: str | Path, device: torch.device | None = None) -> nn.Module:
    """A model with or without a mechanism, in eval mode.

    Args:
        checkpoint: See ``open_checkpoint``.
        device: Where to; None: the CPU.

    Raises:
        CheckpointError, HubError, ValueError: See ``open_checkpoint``.
    """
    return open_checkpoint(str(checkpoint)).model.to(device if device is not None else torch.device("cpu"))


def open_checkpoint(checkpoint: str, *, weights: bool = True) -> Opened:
    """A model and what it is.

    Args:
        checkpoint: A folder made by ``save_pretrained`` or ``timm-csg train`` (also the whole run), a plain timm
            folder, either with or without ``local-dir:``; a repository ``user/name`` or ``hf-hub:user/name``; or a name
            that timm knows, with its pretrained weights.
        weights: Whether to load those of models without a mechanism, too.

    Raises:
        CheckpointError: If the checkpoint does not exist or is damaged.
        HubError: If the Hub cannot be reached or has no such repository.
        ValueError: If timm has no pretrained weights of that name, or cannot build the model.
    """
    folder = checkpoint_folder(checkpoint)
    if folder is None and _is_timm_name(checkpoint):
        return Opened(_plain_model(checkpoint, weights=weights), "timm", checkpoint)
    prefix = "" if checkpoint.startswith(("hf-hub:", "hf_hub:")) else "hf-hub:"
    timm_name = f"{prefix}{checkpoint}" if folder is None else f"local-dir:{folder}"
    try:
        return Opened(from_pretrained(checkpoint if folder is None else folder), "checkpoint", timm_name)
    except NoMechanismError:
        return Opened(_plain_model(timm_name, weights=weights), "plain checkpoint", timm_name)
    except (CheckpointError, HubError) as error:
        question = _spelled_alike(checkpoint) if folder is None else ""
        if not question:
            raise
        raise type(error)(f"{str(error).rstrip('.')}.{question}") from error


def check_local(checkpoint: str) -> None:
    """Load a checkpoint that no download can provide, for the error if it is missing or damaged.

    Raises:
        CheckpointError: If it is a folder without a readable model, or neither a folder nor the name of a model.
    """
    is_folder = checkpoint_folder(checkpoint) is not None
    if is_folder or not (_is_timm_name(checkpoint) or parse_name(checkpoint, None)[0]):
        load_model(checkpoint)


def checkpoint_folder(checkpoint: str | Path) -> Path | None:
    """The checkpoint's folder; of a run the folder ``model`` in it. None if it is not a folder."""
    folder = folder_named(checkpoint)
    if not folder.is_dir():
        return None
    inner = RunFolder(folder).model
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def _is_timm_name(name: str) -> bool:
    return "/" not in name and is_model(name.partition(".")[0])


def _plain_model(name: str, *, weights: bool) -> nn.Module:
    """A model of timm, in eval mode; without weights on the meta device."""
    if weights and ":" not in name and not getattr(get_pretrained_cfg(name), "has_weights", False):
        raise ValueError(f"timm has no pretrained weights of {name}; name a folder or another model.")
    try:
        with explained(f"load {name}", _repository(name)), torch.device("cpu" if weights else "meta"):
            model: nn.Module = timm.create_model(name, pretrained=weights)
    except (RuntimeError, TypeError, AssertionError, LookupError) as error:  # timm's constructors check little
        raise ValueError(f"timm cannot load {name}: {error}") from error
    return model.eval()


def _repository(name: str) -> str | None:
    """Where timm downloads a model's weights from; None if nowhere."""
    if name.startswith(("hf-hub:", "hf_hub:")):
        return name.partition(":")[2]
    repo_id: str | None = getattr(get_pretrained_cfg(name), "hf_hub_id", None) if ":" not in name else None
    return repo_id


def _spelled_alike(checkpoint: str) -> str:
    """A question that suggests a folder or timm model whose name differs by a typo; empty if none does."""
    place = Path()
    parts = folder_named(checkpoint).parts
    for index, part in enumerate(parts):
        if not (place / part).exists():
            beside = [path.name for path in place.iterdir()] if place.is_dir() else []
            alike = difflib.get_close_matches(part, beside, n=1)
            whole = [str(Path(place, *alike, *parts[index + 1 :]))] if alike else []
            return nearest(checkpoint, whole) or nearest(checkpoint, list_models(), 4)
        place = place / part
    return ""


class CheckpointAndData(NamedTuple):
    """What ``load_checkpoint_and_data`` returns.

    Attributes:
        model: In eval mode, on the device of the settings.
        loader: All validation images in order, as the model expects them.
        class_names: One name for each class of the model.
    """

    model: nn.Module
    loader: Loader
    class_names: list[str]


def check_data_options(options: Collection[str], known: Collection[str] = DATA_OPTIONS) -> None:
    """Refuse options that do not describe the data.

    Args:
        options: Names of those that were given.
        known: The valid ones.

    Raises:
        ValueError: If there are others; the message lists the valid ones.
    """
    wrong = sorted(set(options) - set(known))
    if wrong:
        raise ValueError(f"unknown option {', '.join(wrong)}; options of the data are {', '.join(known)}.")


def settings_of(given: dict[str, Any], checkpoint: str) -> TrainSettings:
    """The data options that were given; those left out are what a ``timm-csg train`` run was made with, if it was.

    Args:
        given: Options in ``DATA_OPTIONS``.
        checkpoint: A name or folder; a run is found from its models, too.

    Returns:
        Resolved settings.

    Raises:
        ValueError: If an option is wrong, or the settings of the run are damaged.
    """
    asked, run = TrainSettings(**given).resolved(), RunFolder.of(checkpoint)
    if run is None:
        return asked
    trained = run.settings()
    moved = asked.folder is not None and trained.folder is not None and asked.folder != trained.folder
    if "data" in given and not moved and asked.data != trained.resolved().data:
        return asked
    names = [*DATA_OPTIONS, "in_chans", "train_split"]
    settings = TrainSettings(**{name: getattr(trained, name) for name in names} | given).resolved()
    if moved and "val_fraction" not in given and has_validation(settings):
        settings = replace(settings, val_fraction=None, val_seed=None)
    return settings


def load_with_input(checkpoint: str, given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], TrainSettings | None]:
    """A model, how its images are prepared, and what is known of its data, for commands that need no data set.

    Args:
        checkpoint: See ``open_checkpoint``.
        given: Options in ``IMAGE_OPTIONS``.

    Returns:
        The model on its device; its config, see ``input_config``; the settings that name the data, None if none do.

    Raises:
        CheckpointError, HubError, ValueError: See ``open_checkpoint`` and ``settings_of``.
    """
    has_data = "data" in given or RunFolder.of(checkpoint) is not None
    settings = settings_of(given, checkpoint) if has_data else TrainSettings(**given)
    model = load_model(checkpoint, find_device(settings.device))
    config = model_input_config(model, settings, has_data=has_data)
    return model, config, settings if has_data else None


def load_checkpoint_and_data(checkpoint: str, settings: TrainSettings) -> CheckpointAndData:
    """A model and the validation images of the settings, from one pass of ``timm.data`` without augmentation.

    Args:
        checkpoint: See ``open_checkpoint``.
        settings: Resolved; of them the fields in ``DATA_OPTIONS`` count.

    Returns:
        The model, the loader, and the names of the model's classes.

    Raises:
        CheckpointError, HubError, ValueError: See ``open_checkpoint``; also if the data is not found or has other
            classes.
    """
    device = find_device(settings.device)
    model = load_model(checkpoint, device)
    config = model_input_config(model, settings)
    dataset = open_split(settings, is_training=False)
    found = class_names(dataset, settings, default=int(model.num_classes))  # type: ignore[arg-type]
    names, new_labels = match_classes(checkpoint, model, found, settings)
    if not isinstance(dataset, IterableDataset):
        mode = image_mode(config["input_size"][0])
        dataset = CheckedImages(dataset, len(names), mode=mode, new_labels=new_labels)
    elif new_labels is not None:
        raise ValueError(
            f"the classes of --data {settings.data} are in a different order from those of {checkpoint}, and a "
            "streaming data set cannot be relabelled; use image folders."
        )
    return CheckpointAndData(model, make_loader(dataset, config, settings, device), names)
