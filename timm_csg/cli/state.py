"""The state of a training on disk: one file of ``torch.save``, read back without running code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from timm_csg.checkpoint import replacing
from timm_csg.cli.terminal import TrainingError
from timm_csg.manifest import CheckpointError, short


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn failures of writing into one sentence that names the folder and what is left there.

    Raises:
        TrainingError: If the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise TrainingError(
            f"cannot write to {folder}: {error}. The previous state is intact; free disk space or fix permissions, "
            "then continue with --resume."
        ) from error


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write nested dictionaries and lists of tensors and plain values, completely or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:  # torch's writer hides the disk's own error behind one about positions
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path) -> dict[str, Any]:
    """Read ``save_state``'s file, its tensors on the CPU.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on bytes of other formats
        raise CheckpointError(
            f"{path} is damaged: {short(str(error))}; delete it to train this recipe from the start."
        ) from error
    return state
