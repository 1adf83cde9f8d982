"""Checkpoints on disk: plain timm's files untouched, the mechanism beside them.

::

    model.safetensors        exactly plain timm's keys; timm.create_model("local-dir:...", pretrained=True) loads it
    config.json              timm's, with one more root key "timm_csg"
    timm_csg.safetensors     the mechanism
    metrics.json             what was measured, if anything
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_csg.mechanisms.base import list_mechanisms, resolve_config
from timm_csg.model import DifferentiatedModel, differentiate, plain
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
FORMAT = 1
_WEIGHTS, _MECHANISM, _CONFIG, _METRICS = "model.safetensors", "timm_csg.safetensors", "config.json", "metrics.json"
_PREFIX = "mechanism."


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, foreign, or does not fit the model; nothing has been changed."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes when it does not.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole or not at all")
        >>> target.read_text()
        'whole or not at all'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    metrics: dict[str, Any] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Save a differentiated model so that both this package and plain timm can load it.

    The weights are written as plain timm writes them, contiguous and untied, whatever the memory format of the model.
    Every file is written under a temporary name and then renamed, ``config.json`` with the others' checksums last.
    For mechanisms that act at inference without targets, plain timm loads the weights but computes other logits.

    Args:
        model: A differentiated model, also wrapped in DistributedDataParallel or compiled.
        directory: Folder, made if it does not exist. Other files in it are left alone.
        metrics: What was measured, written to ``metrics.json``.
        base_model: Where the weights came from before training, for example ``"timm/resnet18.a1_in1k"``.
        base_revision: Its commit.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is not differentiated.
        ValueError: If ``metrics`` cannot be written as JSON.
        OSError: If the folder cannot be written; files of an earlier save are then still whole.
    """
    model = unwrap_model(model)
    if not isinstance(model, DifferentiatedModel):
        raise TypeError(
            f"expected a differentiated model, but found {type(model).__name__}; plain timm models have "
            "timm.models.save_for_hf."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # Renamed in the reverse order of this list when the stack unwinds: config.json last.
        config_file = stack.enter_context(replacing(directory / _CONFIG))
        if metrics is not None:
            metrics_file = stack.enter_context(replacing(directory / _METRICS))
            metrics_file.write_text(_to_json(metrics))
        mechanism_file = stack.enter_context(replacing(directory / _MECHANISM))
        weights_file = stack.enter_context(replacing(directory / _WEIGHTS))
        _save_tensors(model.mechanism.state_dict(), mechanism_file)
        with plain(model):
            config = _write_plain(model, weights_file, config_file)
        config["timm_csg"] = {
            "format": FORMAT,
            "mechanism": model.mechanism.name,
            "config": model.mechanism.config.to_dict(),
            "acts_without_targets": model.mechanism.acts_without_targets,
            "versions": {"timm_csg": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
            "base_model": base_model,
            "base_revision": base_revision,
            "sha256": {_WEIGHTS: _sha256(weights_file), _MECHANISM: _sha256(mechanism_file)},
        }
        config_file.write_text(_to_json(config))
    return directory


def save_plain(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Save a plain timm model as timm does, but also in channels_last, with tied tensors, and atomically.

    Args:
        model: A timm model that is not differentiated.
        directory: Folder, made if it does not exist.

    Returns:
        The folder.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / _CONFIG) as config_file, replacing(directory / _WEIGHTS) as weights_file:
        config_file.write_text(_to_json(_write_plain(model, weights_file, config_file)))
    return directory


def from_pretrained(name: str | os.PathLike[str]) -> DifferentiatedModel:
    """Load a model saved by ``save_pretrained``, differentiated, in eval mode, on the CPU.

    Args:
        name: The folder, also as ``"local-dir:folder"``.

    Returns:
        The model; its standard and gated logits are bit for bit those of the saved one.

    Raises:
        CheckpointError: If the folder holds no such checkpoint, or a damaged one.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_pretrained(differentiate(timm.create_model("test_resnet", num_classes=10)), folder)
        >>> from_pretrained(folder).mechanism.class_filter_matrix().shape
        torch.Size([10, 96])
    """
    directory = Path(str(name).removeprefix("local-dir:"))
    config = _read_config(directory)
    own = config["timm_csg"]
    weights, mechanism_state = _read_parts(directory, own)
    try:
        model = timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=config.get("num_classes"))
        _, mechanism_config = resolve_config(own["mechanism"], own["config"])
        differentiated = differentiate(model, mechanism=mechanism_config)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory / _CONFIG} does not describe a model that can be built: {error}") from error
    mechanism_state = {_PREFIX + key: value for key, value in mechanism_state.items()}
    _load_all(differentiated, {**weights, **mechanism_state}, directory)
    differentiated.eval()
    return differentiated


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load weights into a model that exists: all or nothing, strictly, never through pickle code.

    Args:
        model: A timm model. A differentiated one takes checkpoints with a mechanism, or plain ones and keeps its own.
        path: A folder made by ``save_pretrained``, or a file: ``.safetensors``, or one that
            ``torch.load(weights_only=True)`` reads, such as those of timm's training script (entries ``state_dict`` or
            ``model`` are looked into).

    Returns:
        The same model.

    Raises:
        CheckpointError: If the file is damaged or does not fit, naming the keys; the model is then unchanged.
    """
    path = Path(path)
    target = unwrap_model(model)
    if path.is_dir():
        own = _read_config(path)["timm_csg"]
        if isinstance(target, DifferentiatedModel) and own["mechanism"] != target.mechanism.name:
            raise CheckpointError(
                f"{path} holds mechanism {own['mechanism']!r}, but the model has {target.mechanism.name!r}; "
                "differentiate accordingly, or use from_pretrained()."
            )
        weights, mechanism_state = _read_parts(path, own)
        if isinstance(target, DifferentiatedModel):
            weights |= {_PREFIX + key: value for key, value in mechanism_state.items()}
    else:
        weights = _read_file(path)
    if isinstance(target, DifferentiatedModel) and not any(key.startswith(_PREFIX) for key in weights):
        _logger.info("%s is a plain timm checkpoint: the mechanism keeps its values", path)
        weights |= {key: value for key, value in target.state_dict().items() if key.startswith(_PREFIX)}
    _load_all(target, weights, path)
    return model


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {directory}: there is no {_CONFIG} in it.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {error}.") from error
    own = config.get("timm_csg") if isinstance(config, dict) else None
    if own is None:
        raise CheckpointError(
            f"{path} is a checkpoint without a mechanism; load it with timm.create_model('local-dir:{directory}', "
            "pretrained=True) and call differentiate()."
        )
    if not isinstance(own, dict) or not isinstance(own.get("format"), int):
        raise CheckpointError(f"{path} is damaged: its entry 'timm_csg' has no format number.")
    if own["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {own['format']}, this version reads up to {FORMAT}; pip install --upgrade timm_csg."
        )
    if not isinstance(own.get("sha256", {}), dict):
        raise CheckpointError(f"{path} is damaged: its checksums are no dictionary.")
    if own.get("mechanism") not in list_mechanisms() or not isinstance(own.get("config"), dict):
        raise CheckpointError(
            f"{path} names the mechanism {own.get('mechanism')!r}; known here are {', '.join(list_mechanisms())}."
        )
    return config


def _read_parts(directory: Path, own: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for name in (_WEIGHTS, _MECHANISM):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint at {directory} is incomplete: {name} is missing.")
        expected = own.get("sha256", {}).get(name)
        if expected is not None and expected != _sha256(path):
            raise CheckpointError(
                f"{path} is damaged or was not saved together with {_CONFIG} (its checksum differs); "
                "save or download again."
            )
    return _read_file(directory / _WEIGHTS), _read_file(directory / _MECHANISM)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of timm's training script
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}.") from error
    except Exception as error:  # there is no end to what the readers raise on bytes that are not theirs
        raise CheckpointError(f"{path} is damaged or not a checkpoint of tensors: {error}") from error
    for entry in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict of tensors.")
    cleaned: dict[str, Tensor] = clean_state_dict(state)
    return cleaned


def _load_all(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if not isinstance(model, DifferentiatedModel) and any(key.startswith(_PREFIX) for key in weights):
        problems.insert(0, "it holds a mechanism: differentiate() the model first")
    problems += [
        f"{key} is not finite"
        for key, value in weights.items()
        if key.startswith(_PREFIX) and value.is_floating_point() and not value.isfinite().all()
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{origin} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}.")
    model.load_state_dict(weights, strict=True)


def _write_plain(model: nn.Module, weights_file: Path, config_file: Path) -> dict[str, Any]:
    _save_tensors(model.state_dict(), weights_file)
    save_config_for_hf(model, str(config_file))
    config: dict[str, Any] = json.loads(config_file.read_text())
    # transformers' TimmWrapper passes num_classes itself and fails on a second one; timm reads the root key.
    config.get("model_args", {}).pop("num_classes", None)
    return config


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as plain timm's keys: own memory each, contiguous, on the CPU."""
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _to_json(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected values that JSON can hold (finite numbers, strings, lists), but found: {error}"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
