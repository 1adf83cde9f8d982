"""A model by whatever names it: a timm name, a folder, a ``timm-csg train`` run, a repository of the Hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, list_models
from torch import nn

from timm_csg.checks import nearest
from timm_csg.cli.runs import RunFolder
from timm_csg.hub import from_pretrained, parse_name
from timm_csg.hub_errors import HubError, explained
from timm_csg.manifest import CONFIG, CheckpointError, NoMechanismError, folder_named


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
    except RuntimeError as error:
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
