"""A trained model and the images to look at it with, for the commands that measure, report and explain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import IterableDataset

from timm_csg.cli.checkpoints import load_model
from timm_csg.cli.classes import class_names, match_classes
from timm_csg.cli.data import has_validation, open_split
from timm_csg.cli.distributed import find_device
from timm_csg.cli.images import CheckedImages
from timm_csg.cli.preprocessing import Loader, make_loader, model_input_config
from timm_csg.cli.runs import RunFolder
from timm_csg.cli.settings import DATA_OPTIONS, TrainSettings
from timm_csg.pictures import image_mode


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
