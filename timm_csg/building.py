"""A model from an untrusted ``config.json``: nothing larger is built than its files can fill."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from timm_csg.differentiation import differentiate
from timm_csg.manifest import CONFIG, NO_MODEL, CheckpointError, short
from timm_csg.mechanisms.base import MechanismConfig
from timm_csg.model import DifferentiatedModel
from timm_csg.tensors import Header

_MAX_ARGUMENT = 2**16
_MAX_VALUES = 2**17


def check_buildable(config: dict[str, Any], path: Path) -> None:
    """Refuse architectures that are not registered, and arguments that no saved model has.

    Raises:
        CheckpointError: If the config would not build a model, or one that nobody can have saved.
    """
    architecture, num_classes = config.get("architecture"), config.get("num_classes")
    problem = None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        problem = (
            f"{short(repr(architecture))} is not an architecture that timm {timm.__version__} knows; upgrade timm, or "
            "import the file that registers it"
        )
    elif type(num_classes) is not int or not 1 <= num_classes <= 2**24:
        problem = f"num_classes must be a whole number, 1 or more, but is {short(num_classes)}"
    for name in ("model_args", "pretrained_cfg"):
        values = config.get(name, {})
        if problem is None and not isinstance(values, dict):
            problem = f"{name} must be a dictionary, but is {short(values)}"
        elif problem is None:
            problem = _absurd(name, {key: value for key, value in values.items() if key != "num_classes"})
    if problem is not None:
        raise CheckpointError(f"{path} {NO_MODEL}: {problem}.")


def _absurd(name: str, values: Any) -> str | None:
    """What is wrong with a nest of JSON values, without recursion: numbers out of any range, or too many values."""
    pending, seen = [values], 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > _MAX_VALUES:
            return f"{name} has more than {_MAX_VALUES:,} values"
        if isinstance(value, (dict, list)):
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, (int, float)) and not abs(value) <= _MAX_ARGUMENT:
            return f"{name} holds the number {short(value, 40)}, but no model has arguments beyond {_MAX_ARGUMENT:,}"
    return None


def build(directory: Path, num_classes: int, options: MechanismConfig) -> DifferentiatedModel:
    """The differentiated model that a checked ``config.json`` describes, with fresh weights.

    Raises:
        CheckpointError: If it cannot be built.
    """
    try:
        model = timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=num_classes)
        return differentiate(model, num_classes, options)
    except Exception as error:  # timm's constructors raise whatever Python does on arguments they do not check
        problem = short(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{directory / CONFIG} does not describe a model that can be built: {problem}") from error


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Stop building a model in this thread that has more modules than this, with a ValueError."""
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


def check_size(skeleton: nn.Module, headers: dict[str, Header], path: Path) -> None:
    """Refuse buffers that are in no file, such as position tables, and larger than anything the weights call for.

    Raises:
        CheckpointError: If there are.
    """
    allowed = 2**28 + 16 * sum(math.prod(header.shape) for header in headers.values())
    needed = sum(buffer.numel() for buffer in skeleton.buffers())
    if needed > allowed:
        raise CheckpointError(
            f"{path} does not describe a model that can be built: its tables would have {needed:,} values, far more "
            "than its weights; model_args or pretrained_cfg is damaged."
        )
