"""Tensors of checkpoint files: safetensors, and what hosts write with ``torch.save``; none of their code is run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from timm_csg.manifest import CheckpointError, short
from timm_csg.tensors import COUNTER, Header

_logger = logging.getLogger(__name__)
MECHANISM_PREFIX = "mechanism."


class _Ignored:
    """Stands for an object that is not a tensor, such as a hyper-parameter; its class is never imported."""

    def __new__(cls, *_: object, **__: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def load_file(path: Path) -> Any:
    """What a file holds; in files of ``torch.save`` objects of other packages are left out.

    Args:
        path: ``.safetensors``, or a file of ``torch.save`` such as timm's ``last.pth.tar`` or Lightning's ``.ckpt``.

    Returns:
        Its tensors by key, or whatever a host keeps around them.

    Raises:
        CheckpointError: If the file does not exist, is damaged, or cannot be read without running its code.
    """
    others: list[str] = []
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        others = _other_objects(path)
        with torch.serialization.safe_globals([(_Ignored, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except Exception as error:  # the readers raise anything on bytes of other formats
        if others:
            raise CheckpointError(
                f"{path} holds objects that cannot be left out ({short(', '.join(sorted(others)))}). If you trust the "
                f"file, torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'weights.pth') keeps its "
                "tensors; load that."
            ) from error
        raise CheckpointError(f"{path} is damaged or not a checkpoint of tensors: {short(str(error))}") from error


def _other_objects(path: Path) -> list[str]:
    """Names of the classes and functions in a file that ``torch.load(weights_only=True)`` would stop at."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before torch 1.6, or not a file of torch.save
        return []


def read_headers(path: Path) -> dict[str, Header]:
    """Shapes and kinds of the tensors in a safetensors file, without reading them.

    Raises:
        CheckpointError: If it is not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, "pt") as tensors:
            parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {key: str(part.get_dtype()) for key, part in parts.items()}  # F32, BF16, C64, I8, U8, BOOL, ...
            kinds = {key: next((kind for kind in "FC" if kind in dtype), "I") for key, dtype in kinds.items()}
            return {key: Header(tuple(part.get_shape()), kinds[key]) for key, part in parts.items()}
    except Exception as error:  # the reader has an exception of its own for each kind of damage
        raise CheckpointError(f"{path} is damaged or not a checkpoint of tensors: {short(str(error))}") from error


def read_tensors(path: Path, *, with_task: bool = False) -> dict[str, Tensor]:
    """The state dict in a file, also below the entry that hosts keep it in, without the prefixes of wrappers.

    Args:
        path: See ``load_file``.
        with_task: Also the mechanism that a ``DifferentiationTask`` keeps beside the weights.

    Raises:
        CheckpointError: As ``load_file``, or if it holds no state dict.
    """
    state = load_file(path)
    task = state.get("task_state") if with_task and isinstance(state, dict) else None
    for entry in ("state_dict", "model", "model_state_dict", "module", "net"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if isinstance(state, dict) and isinstance(task, dict) and isinstance(task.get("state"), dict):
        state = state | {MECHANISM_PREFIX + str(key): value for key, value in task["state"].items()}
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        kinds = f" with the entries {short(', '.join(map(str, state)))}" if isinstance(state, dict) else ""
        raise CheckpointError(
            f"{path} holds a {type(state).__name__.lstrip('_').lower()}{kinds}, not a state dict of tensors; save the "
            "one of the model, torch.save(model.state_dict(), 'weights.pth'), and load that."
        )
    cleaned: dict[str, Tensor] = clean_state_dict({str(key): value for key, value in state.items()})
    return cleaned


def of_model(
    state: dict[str, Tensor], expected: Collection[str], origin: Path, prefix: str | None = None
) -> dict[str, Tensor]:
    """The tensors of one model among those of a host: Lightning's ``model.``, transformers' ``timm_model.``.

    Args:
        state: All tensors of a file.
        expected: Keys of the model; those of its mechanism may be missing in the file.
        origin: The file, for errors.
        prefix: What the keys of the model begin with; None: detected.

    Returns:
        Those tensors under the model's own keys; all of them if no part of the file is such a model.

    Raises:
        CheckpointError: If nothing begins with ``prefix``, or several models fit and none is chosen.
    """
    needed = [key for key in expected if not key.startswith(MECHANISM_PREFIX) and not key.endswith(COUNTER)]
    if prefix is None:
        if not needed or any(key in state for key in needed):
            return state
        begins = {key.removesuffix(needed[0]) for key in state if key.endswith("." + needed[0])}
        fitting = sorted(begin for begin in begins if all(begin + key in state for key in needed))
        if len(fitting) > 1:
            raise CheckpointError(
                f"{origin} holds several models of this kind, under {' and '.join(map(repr, fitting))}; choose one "
                f"with load_checkpoint(model, path, prefix={fitting[0]!r})."
            )
        if not fitting:
            return state
        prefix = fitting[0]
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not found:
        parts = sorted({key.partition(".")[0] + "." for key in state})
        raise CheckpointError(
            f"no key in {origin} begins with {prefix!r}; its keys begin with {short(', '.join(parts))}."
        )
    _logger.info("%s: took the %d tensors under %r, left out %d", origin, len(found), prefix, len(state) - len(found))
    return found
