"""Checkpoints on disk: plain timm's files untouched, the mechanism beside them.

::

    model.safetensors        exactly plain timm's keys; timm.create_model("local-dir:...", pretrained=True) loads it
    config.json              timm's, with one more root key "timm_csg"
    timm_csg.safetensors     the mechanism
    metrics.json             what was measured, if anything
    README.md                model card; a README without our markers is its author's and left alone
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
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
from torch.nn.modules.module import register_module_module_registration_hook

from timm_csg import card, manifest
from timm_csg.manifest import ASSETS, CONFIG, FORMAT, MECHANISM, METRICS, README, WEIGHTS, Header
from timm_csg.manifest import CheckpointError as CheckpointError
from timm_csg.mechanisms.base import MechanismConfig
from timm_csg.model import DifferentiatedModel, differentiate, plain
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
_PREFIX = "mechanism."


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
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files unreadable to others
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
    ``README.md`` becomes a model card; in one that exists only the block between our markers is replaced.
    For mechanisms that act at inference without targets, plain timm loads the weights but computes other logits.

    Args:
        model: A differentiated model, also wrapped in DistributedDataParallel or compiled.
        directory: Folder, made if it does not exist. Other files in it are left alone.
        metrics: What was measured, written to ``metrics.json``; None: nothing was, and an earlier file goes.
        base_model: Where the weights came from before training, for example ``"timm/resnet18.a1_in1k"``.
        base_revision: Its commit.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is not differentiated.
        ValueError: If ``metrics`` cannot be written as JSON.
        OSError: If the folder cannot be written. An earlier save is then still whole, or, if it happened between two
            renames, loading it fails with a checksum error; never with a mixture of the two.
    """
    model = unwrap_model(model)
    if not isinstance(model, DifferentiatedModel):
        raise TypeError(
            f"expected a differentiated model, but found {type(model).__name__}; plain timm models have "
            "timm.models.save_for_hf."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    readme = _readme(model, directory, metrics, base_model)
    with ExitStack() as stack:
        # Renamed in the reverse order of this list when the stack unwinds: config.json last.
        config_file = stack.enter_context(replacing(directory / CONFIG))
        if readme is not None:
            readme_file = stack.enter_context(replacing(directory / README))
            readme_file.write_text(readme, encoding="utf-8", newline="")
        if metrics is not None:
            metrics_file = stack.enter_context(replacing(directory / METRICS))
            metrics_file.write_text(_to_json(metrics))
        mechanism_file = stack.enter_context(replacing(directory / MECHANISM))
        weights_file = stack.enter_context(replacing(directory / WEIGHTS))
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
            "sha256": {WEIGHTS: manifest.sha256(weights_file), MECHANISM: manifest.sha256(mechanism_file)},
        }
        config["timm_csg"]["sha256"][CONFIG] = manifest.fingerprint(config)
        config_file.write_text(_to_json(config))
    if metrics is None:
        (directory / METRICS).unlink(missing_ok=True)  # it told of other weights
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
    with replacing(directory / CONFIG) as config_file, replacing(directory / WEIGHTS) as weights_file:
        config_file.write_text(_to_json(_write_plain(model, weights_file, config_file)))
    return directory


def load_directory(directory: str | os.PathLike[str], *, source: str | None = None) -> DifferentiatedModel:
    """Load a model saved by ``save_pretrained``, differentiated, in eval mode, on the CPU.

    The folder may come from anywhere: the model is first built without memory and compared with the shapes in the
    files, so that only a model as large as its files is ever made.

    Args:
        directory: The folder.
        source: Where it comes from, in timm's words, for errors; None: ``"local-dir:folder"``.

    Returns:
        The model; its standard and gated logits are bit for bit those of the saved one.

    Raises:
        CheckpointError: If the folder holds no such checkpoint, or a damaged one.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_pretrained(differentiate(timm.create_model("test_resnet", num_classes=10)), folder)
        >>> load_directory(folder).mechanism.class_filter_matrix().shape
        torch.Size([10, 96])
    """
    directory = Path(directory)
    config = manifest.read_config(directory, source)
    own, config_file = config["timm_csg"], directory / CONFIG
    manifest.check_files(directory, own)
    headers = manifest.read_headers(directory / WEIGHTS)
    headers |= {_PREFIX + key: value for key, value in manifest.read_headers(directory / MECHANISM).items()}
    options = manifest.mechanism_config(own, config_file)
    manifest.check_buildable(config, config_file)
    with torch.device("meta"), _at_most(32 * len(headers) + 2000):
        skeleton = _build(directory, config["num_classes"], options)
    _check_fit(skeleton, headers, directory)
    _check_size(skeleton, headers, config_file)
    manifest.check_fingerprint(config, config_file)
    weights, mechanism_state = _read_file(directory / WEIGHTS), _read_file(directory / MECHANISM)
    model = _build(directory, config["num_classes"], options)
    _load_all(model, weights | {_PREFIX + key: value for key, value in mechanism_state.items()}, directory)
    model.eval()
    return model


def _build(directory: Path, num_classes: int, options: MechanismConfig) -> DifferentiatedModel:
    try:
        model = timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=num_classes)
        return differentiate(model, num_classes, options)
    except Exception as error:  # timm's constructors raise whatever Python does on arguments they do not check
        problem = manifest.short(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{directory / CONFIG} does not describe a model that can be built: {problem}") from error


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Stop building a model in this thread that has far more modules than its files have tensors."""
    thread, left = threading.get_ident(), modules

    def count(*_: object) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise ValueError("it would have far more layers than its weights")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_size(skeleton: nn.Module, headers: dict[str, Header], path: Path) -> None:
    """Refuse buffers that are in no file, such as position tables, and larger than anything the weights call for."""
    allowed = 2**28 + 16 * sum(math.prod(header.shape) for header in headers.values())
    needed = sum(buffer.numel() for buffer in skeleton.buffers())
    if needed > allowed:
        raise CheckpointError(
            f"{path} does not describe a model that can be built: its tables would have {needed:,} values, far more "
            "than its weights; model_args or pretrained_cfg is damaged."
        )


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load weights into a model that exists: all or nothing, strictly, never through pickle code.

    Args:
        model: A timm model. A differentiated one takes checkpoints with a mechanism, or plain ones and keeps its own.
        path: A folder made by ``save_pretrained``, or a file: ``.safetensors``, or one that
            ``torch.load(weights_only=True)`` reads, such as those of timm's training script (entries ``state_dict`` or
            ``model`` are looked into, and the ``task_state`` of a ``DifferentiationTask``).

    Returns:
        The same model.

    Raises:
        CheckpointError: If the file is damaged or does not fit, naming the keys; the model is then unchanged.
    """
    path = Path(path)
    target = unwrap_model(model)
    if path.is_dir():
        own = manifest.read_config(path)["timm_csg"]
        if isinstance(target, DifferentiatedModel) and own["mechanism"] != target.mechanism.name:
            raise CheckpointError(
                f"{path} holds mechanism {own['mechanism']!r}, but the model has {target.mechanism.name!r}; "
                "differentiate accordingly, or use from_pretrained()."
            )
        manifest.check_files(path, own)
        weights, mechanism_state = _read_file(path / WEIGHTS), _read_file(path / MECHANISM)
        if isinstance(target, DifferentiatedModel):
            weights |= {_PREFIX + key: value for key, value in mechanism_state.items()}
    else:
        weights = _read_file(path, with_task=isinstance(target, DifferentiatedModel))
    if isinstance(target, DifferentiatedModel) and not any(key.startswith(_PREFIX) for key in weights):
        _logger.info("%s is a plain timm checkpoint: the mechanism keeps its values", path)
        weights |= {key: value for key, value in target.state_dict().items() if key.startswith(_PREFIX)}
    _load_all(target, weights, path)
    return model


def _read_file(path: Path, *, with_task: bool = False) -> dict[str, Tensor]:
    """Tensors of a file; ``with_task``: also the mechanism that a ``DifferentiationTask`` keeps beside the weights."""
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
    task = state.get("task_state") if with_task and isinstance(state, dict) else None
    for entry in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if isinstance(state, dict) and isinstance(task, dict) and isinstance(task.get("state"), dict):
        state = state | {_PREFIX + str(key): value for key, value in task["state"].items()}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict of tensors.")
    cleaned: dict[str, Tensor] = clean_state_dict(state)
    return cleaned


def _load_all(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    headers = {key: Header.of(value) for key, value in weights.items()}
    problems = [
        f"{key} is not finite"
        for key, value in weights.items()
        if key.startswith(_PREFIX) and value.is_floating_point() and not value.isfinite().all()
    ]
    _check_fit(model, headers, origin, problems)
    model.load_state_dict(weights, strict=True)


def _check_fit(model: nn.Module, found: dict[str, Header], origin: Path, others: Sequence[str] = ()) -> None:
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in expected]
    problems += [
        f"{key} has shape {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != tuple(value.shape)
    ]
    problems += [
        f"{key} holds numbers of another kind than {value.dtype}"
        for key, value in expected.items()
        if key in found and found[key].kind != Header.of(value).kind
    ]
    if not isinstance(model, DifferentiatedModel) and any(key.startswith(_PREFIX) for key in found):
        problems.insert(0, "it holds a mechanism: differentiate() the model first")
    problems += others
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{origin} does not fit this {type(model).__name__}: {'; '.join(map(manifest.short, problems[:5]))}{more}."
        )


def _readme(
    model: DifferentiatedModel, directory: Path, metrics: dict[str, Any] | None, base_model: str | None
) -> str | None:
    """The model card with our block brought up to date; None where the README is somebody's own."""
    path = directory / README
    figures = sorted(f"{ASSETS}/{file.name}" for file in (directory / ASSETS).glob("*.png"))
    name = directory.resolve().name
    try:
        previous = path.read_bytes().decode() if path.is_file() else None
        if previous is not None and not card.has_block(previous):
            return None
        return card.model_card(model, card.Facts(name, f"local-dir:{name}", metrics, base_model, figures), previous)
    except ValueError as error:
        _logger.warning("%s is left as it is: %s", path, error)
        return None


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
