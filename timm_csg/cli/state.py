"""The state of a training on disk: one safetensors file, tensors as tensors and everything else as JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timm_csg.checkpoint import replacing
from timm_csg.cli.terminal import TrainingError as TrainingError
from timm_csg.manifest import CheckpointError


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while writing into one sentence that names the place and says what is left there.

    Raises:
        TrainingError: If the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own words
        raise TrainingError(
            f"cannot write to {folder}: {error}. What was there before is whole; make room or give access, then go on "
            "with --resume."
        ) from error


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dictionaries and lists of tensors and JSON values, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, tensors))
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", "state": text})


def load_state(path: Path) -> dict[str, Any]:
    """Read ``save_state``'s file.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  it is no dictionary
            text = (handle.metadata() or {})["state"]
        state: dict[str, Any] = _decode(json.loads(text), tensors)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; delete it to train this recipe from the start.") from error
    return state


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # JSON's keys are strings only, and optimizers number their parameters
        return {"items": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    return {"value": value}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _decode(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content
