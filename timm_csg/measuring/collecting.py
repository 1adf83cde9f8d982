"""One pass over a data set: what every other metric is computed from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from timm_csg.measuring._rows import RowFile, check_free, gather_rows, new_directory, open_rows
from timm_csg.metrics.display import in_one_line
from timm_csg.metrics.pooling import pool
from timm_csg.running import checked_batches, measured
from timm_csg.stage import is_channels_last

_COLUMNS = ("features", "targets", "logits", "gated_logits")


@in_one_line
class Activations(NamedTuple):
    """What ``collect`` returns; all on the CPU, one row per image.

    Attributes:
        features: Spatial mean of the stage's output, before any gate or mask, float32 [samples, filters].
        targets: Class indices, int64 [samples].
        logits: Logits of the standard path, float32 [samples, classes].
        gated_logits: Logits of the gated path, float32 [samples, classes]; None for a plain model. With label gating
            these are computed with the true label and say nothing about unseen images, see ``gated_by`` of ``collect``.
    """

    features: Tensor
    targets: Tensor
    logits: Tensor
    gated_logits: Tensor | None

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Activations:
        """Open what ``collect(..., directory=directory)`` left, memory-mapped: rows are read when they are used.

        Args:
            directory: The folder with ``features.npy``, ``targets.npy``, ``logits.npy`` and, for a differentiated
                model, ``gated_logits.npy``.

        Returns:
            The activations; writing into the tensors does not change the files.

        Raises:
            ValueError: If a file is missing or the files do not belong together.
        """
        paths = [Path(directory).expanduser() / f"{name}.npy" for name in _COLUMNS]
        missing = [path.name for path in paths[:3] if not path.is_file()]
        if missing:
            raise ValueError(
                f"expected activations in {directory}, but found no {', '.join(missing)}; create them with "
                "collect(model, loader, directory=...)."
            )
        columns = [open_rows(path) if path.is_file() else None for path in paths]
        lengths = [len(column) for column in columns if column is not None]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the files in {directory} must have one row per image, but have {lengths} rows; run collect() again."
            )
        return cls(*columns)  # type: ignore[arg-type]


class ShardSampler(Sampler[int]):
    """Every process's share of a data set, each sample exactly once, for metrics under torch.distributed.

    Process r of n takes the samples r, r + n, r + 2n, ...; nothing is repeated to make shares equal, as torch's
    ``DistributedSampler`` does. Shares may differ by one sample, so use it where no step needs all processes.

    Args:
        num_samples: Length of the data set.
        rank: This process; None: that of the running process group.
        world_size: Number of processes; None: that of the running process group.

    Attributes:
        indices: The indices of this share, for ``collect(..., indices=sampler.indices)``.

    Example:
        >>> list(ShardSampler(5, rank=1, world_size=2)), len(ShardSampler(5, rank=0, world_size=2))
        ([1, 3], 3)
    """

    def __init__(self, num_samples: int, *, rank: int | None = None, world_size: int | None = None) -> None:
        rank = dist.get_rank() if rank is None else rank
        world_size = dist.get_world_size() if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, but is {rank}.")
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


@torch.no_grad()
def collect(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    gated_by: Literal["target", "prediction"] = "target",
    directory: str | os.PathLike[str] | None = None,
    distributed: bool = False,
    indices: Sequence[int] | None = None,
) -> Activations:
    """Run a plain or differentiated timm model over a data set in eval mode, once, on the device the model is on.

    The map comes from ``forward_features``, so gates and masks do not change the features. Memory per sample: 4 bytes
    for each filter and class (8 for each class of a differentiated model) and 8 more, see ``collect_bytes``; twice that
    for a moment at the end. With ``directory``: that of a batch, whatever the size of the data set.

    Under torch.distributed call it in every process with ``distributed=True``, each with a loader of its own share
    (``ShardSampler``). All processes get all rows. With ``indices`` the rows come in the order of the data set and a
    sample that a padding sampler repeated is kept once.

    Args:
        model: A timm classifier; its modes are left as found.
        loader: Yields (images, class indices).
        amp_dtype: Autocast dtype, for example ``torch.bfloat16``; None: no autocast.
        progress: Called with the number of images after each batch.
        gated_by: Which class's row the label gate uses for ``gated_logits``: the true one, or the one that the standard
            path predicts. Assigned filters use neither.
        directory: New or empty folder for ``.npy`` files, which the result then maps instead of holding the values. It
            appears when all is written, or not at all; ``Activations.open`` reads it again, in any process. With
            ``distributed`` all processes must see it.
        distributed: Gather the rows of all processes of the running process group.
        indices: With ``distributed``: index in the data set of each of this process's samples, in loader order.

    Returns:
        The activations.

    Raises:
        TypeError: If the loader does not yield pairs of floating-point images and integer targets.
        ValueError: If it yields nothing, images do not suit the model or hold NaN, targets are not its class indices,
            an option is wrong, or the directory is not empty.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> collect(model, [(torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1]))]).features.shape
        torch.Size([3, 96])
    """
    if gated_by not in ("target", "prediction"):
        raise ValueError(f"gated_by must be 'target' or 'prediction', but is {gated_by!r}.")
    if indices is not None and not distributed:
        raise ValueError(
            "indices put the rows of several processes in order; pass distributed=True as well, or leave indices out."
        )
    batches = _batches(model, loader, amp_dtype, progress, gated_by)
    with measured(model):
        if directory is None:
            columns = [torch.cat(column) for column in zip(*batches, strict=True)]
            return _activations(gather_rows(columns, indices, None, _backend_device(model)) if distributed else columns)
        directory = Path(directory).expanduser()
        check_free(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        if distributed:
            _gather_into(directory, batches, indices, _backend_device(model))
        else:
            with new_directory(directory) as folder:
                _write(batches, folder)
    return Activations.open(directory)


def collect_bytes(num_samples: int, num_filters: int, num_classes: int, *, differentiated: bool = False) -> int:
    """Bytes of what ``collect`` returns or writes to its directory (128 more for each file).

    Args:
        num_samples: Images.
        num_filters: Width of the stage.
        num_classes: Classes.
        differentiated: Whether there are gated logits too.

    Returns:
        The number of bytes.

    Example:
        >>> collect_bytes(50_000, 2048, 1000, differentiated=True) / 2**20  # ImageNet's validation images: MiB
        772.4761962890625
    """
    return num_samples * (4 * num_filters + 4 * num_classes * (2 if differentiated else 1) + 8)


def _batches(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    amp_dtype: torch.dtype | None,
    progress: Callable[[int], None] | None,
    gated_by: str,
) -> Iterator[tuple[Tensor, ...]]:
    """The columns of ``Activations`` for each batch, on the CPU."""
    timm_model: Any = model  # its methods are not in nn.Module's type
    device = next(model.parameters()).device
    for images, targets in checked_batches(model, loader, progress):
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            features = timm_model.forward_features(images)
            pooled = pool(features, channels_last=is_channels_last(model))
            outputs = [pooled, timm_model.forward_head(features)]
            if hasattr(model, "mechanism"):
                rows = targets if gated_by == "target" else outputs[1].argmax(dim=1)
                outputs.append(timm_model.forward_head(features, targets=rows))
        pooled, *logits = (tensor.float().cpu() for tensor in outputs)
        yield pooled, targets.long().cpu(), *logits


def _write(batches: Iterable[tuple[Tensor, ...]], folder: Path, *, may_be_empty: bool = False) -> list[Tensor]:
    """Write batches to .npy files as they come, and open these."""
    files: list[RowFile] = []
    try:
        for batch in batches:
            files = files or [RowFile(folder / f"{name}.npy") for name in _COLUMNS[: len(batch)]]
            for file, rows in zip(files, batch, strict=True):
                file.append(rows)
    finally:
        for file in files:
            file.close()
    if not files and not may_be_empty:
        raise ValueError("the loader is empty: it yielded no images.")
    return [open_rows(file.path) for file in files]


def _gather_into(
    directory: Path, batches: Iterable[tuple[Tensor, ...]], indices: Sequence[int] | None, device: torch.device
) -> None:
    """Every process keeps its share on disk until rank 0 has written all of them."""
    with tempfile.TemporaryDirectory(prefix=".", dir=directory.parent) as share:
        columns = _write(batches, Path(share), may_be_empty=True)
        with new_directory(directory) if dist.get_rank() == 0 else nullcontext(Path(share) / "all") as folder:
            gather_rows(columns, indices, [folder / f"{name}.npy" for name in _COLUMNS], device)
    dist.barrier()


def _activations(columns: Sequence[Tensor]) -> Activations:
    if not columns:
        raise ValueError("the loader is empty: it yielded no images.")
    features, targets, logits, *gated = columns
    return Activations(features, targets, logits, gated[0] if gated else None)


def _backend_device(model: nn.Module) -> torch.device:
    """Where torch.distributed wants its tensors: on the CPU if the backend can do that."""
    can_use_cpu = "gloo" in str(dist.get_backend()) or "mpi" in str(dist.get_backend())
    return torch.device("cpu") if can_use_cpu else next(model.parameters()).device
