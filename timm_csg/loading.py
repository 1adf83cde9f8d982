"""Loading: a whole model from a checkpoint folder, or the weights of any host into an existing model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_csg import manifest
from timm_csg.building import at_most, build, check_buildable, check_size
from timm_csg.manifest import MECHANISM, WEIGHTS, CheckpointError
from timm_csg.model import DifferentiatedModel
from timm_csg.reading import MECHANISM_PREFIX, of_model, read_headers, read_tensors
from timm_csg.tensors import Header, misfits, with_counters

_logger = logging.getLogger(__name__)


def load_directory(directory: str | os.PathLike[str], *, source: str | None = None) -> DifferentiatedModel:
    """Load a model saved by ``save_pretrained``, differentiated, in eval mode, on the CPU.

    The folder may come from anywhere: the model is first built without memory and compared with the shapes in the
    files, so that only a model as large as its files is ever made.

    Args:
        directory: The folder.
        source: What timm calls it, for errors; None: ``"local-dir:folder"``.

    Returns:
        The model; its standard and gated logits are bit for bit those of the saved one.

    Raises:
        CheckpointError: If the folder holds no such checkpoint, or a damaged one.

    Example:
        >>> import tempfile, timm, timm_csg
        >>> folder = tempfile.mkdtemp()
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=10))
        >>> _ = timm_csg.save_pretrained(model, folder)
        >>> load_directory(folder).mechanism.class_filter_matrix().shape
        torch.Size([10, 96])
    """
    directory = Path(directory).expanduser()
    found = manifest.Manifest.read(directory, source)
    found.check_files()
    headers = _of_both(directory, read_headers)
    options = manifest.mechanism_config(found.own, found.path)
    check_buildable(found.config, found.path)
    num_classes = found.config["num_classes"]
    with torch.device("meta"), at_most(32 * len(headers) + 2000):
        skeleton = build(directory, num_classes, options)
    _check_fit(skeleton, headers, directory)
    check_size(skeleton, headers, found.path)
    found.check_fingerprint()
    weights = _of_both(directory, read_tensors)
    model = build(directory, num_classes, options)
    _load_all(model, weights, directory)
    model.eval()
    return model


def _of_both(directory: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is read of the weights' and of the mechanism's tensors, by the keys of the model."""
    mechanism = read(directory / MECHANISM)
    return read(directory / WEIGHTS) | {MECHANISM_PREFIX + key: value for key, value in mechanism.items()}


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, prefix: str | None = None) -> nn.Module:
    """Load weights into an existing model: all or nothing, strictly, without running pickled code.

    Args:
        model: A timm model. A differentiated one takes checkpoints with a mechanism, or plain ones and keeps its own.
        path: A folder made by ``save_pretrained`` or by transformers' Trainer (``checkpoint-500``), or a file:
            ``.safetensors``, or one of ``torch.save``, such as those of timm's training script and Lightning. Entries
            ``state_dict``, ``model`` and their like are looked into, and the ``task_state`` of a
            ``DifferentiationTask``; hyper-parameters and other objects beside the tensors are left out, whatever they
            are.
        prefix: What the keys of the model begin with, such as ``"model."`` in Lightning's files; None: detected, if
            only one fits. Tensors under other prefixes are left out.

    Returns:
        The same model.

    Raises:
        CheckpointError: If the file is damaged or does not fit, naming the keys; the model is then unchanged.
    """
    path = Path(path).expanduser()
    target = unwrap_model(model)
    is_differentiated = isinstance(target, DifferentiatedModel)
    if path.is_dir() and not manifest.is_transformers_folder(path):
        found = manifest.Manifest.read(path)
        if isinstance(target, DifferentiatedModel) and found.own["mechanism"] != target.mechanism.name:
            raise CheckpointError(
                f"{path} holds mechanism {found.own['mechanism']!r}, but the model has {target.mechanism.name!r}; "
                "differentiate accordingly, or use from_pretrained()."
            )
        found.check_files()
        weights = _of_both(path, read_tensors) if is_differentiated else read_tensors(path / WEIGHTS)
    else:
        path = _weights_of_trainer(path) if path.is_dir() else path
        weights = read_tensors(path, with_task=is_differentiated)
    weights = of_model(weights, target.state_dict().keys(), path, prefix)
    if is_differentiated and not any(key.startswith(MECHANISM_PREFIX) for key in weights):
        _logger.info("%s is a plain timm checkpoint: the mechanism keeps its values", path)
        weights |= {key: value for key, value in target.state_dict().items() if key.startswith(MECHANISM_PREFIX)}
    _load_all(target, weights, path)
    return model


def _weights_of_trainer(folder: Path) -> Path:
    """The file with the weights that transformers wrote into a folder."""
    found = next((folder / name for name in (WEIGHTS, "pytorch_model.bin") if (folder / name).is_file()), None)
    if found is None:
        shards = any(folder.glob("*.index.json"))
        why = "its weights are in several files; save_pretrained(..., max_shard_size='1TB') of transformers makes one"
        raise CheckpointError(f"{folder} has no {WEIGHTS}{f': {why}' if shards else ''}.")
    return found


def _load_all(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    weights = with_counters(weights, model.state_dict())
    headers = {key: Header.of(value) for key, value in weights.items()}
    problems = [
        f"{key} is not finite"
        for key, value in weights.items()
        if key.startswith(MECHANISM_PREFIX) and value.is_floating_point() and not value.isfinite().all()
    ]
    _check_fit(model, headers, origin, problems)
    model.load_state_dict(weights, strict=True)


def _check_fit(model: nn.Module, found: dict[str, Header], origin: Path, others: Sequence[str] = ()) -> None:
    problems = misfits(found, model.state_dict())
    if not isinstance(model, DifferentiatedModel) and any(key.startswith(MECHANISM_PREFIX) for key in found):
        problems.insert(0, "it holds a mechanism: differentiate() the model first")
    problems += others
    if problems:
        raise CheckpointError(f"{origin} does not fit this {type(model).__name__}: {manifest.listed(problems)}.")
