"""Rows of several columns, one row per image: in memory, in .npy files on disk, and gathered from all processes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_HEADER_BYTES = 128
_BLOCK_BYTES = 2**26  # rows sent between processes at once


@contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes ``directory`` when the block ends well and vanishes when it does not."""
    directory = Path(directory)
    check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb+") as handle:
                os.fsync(handle.fileno())
        with suppress(OSError):
            directory.rmdir()  # where it exists and is empty; some systems do not rename over it
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(directory: Path) -> None:
    """Raise unless the folder is new or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"directory must be new or empty, but {directory} is not; read its contents with "
            "Activations.open(directory), or choose another directory."
        )


class RowFile:
    """An .npy file that grows by rows; it is one only after ``close``, which writes the header."""

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, path.open("xb")
        self._handle.write(bytes(_HEADER_BYTES))
        self._shape, self._dtype = [0], np.dtype(np.float32)

    def append(self, rows: Tensor) -> None:
        array = np.ascontiguousarray(rows.numpy())
        self._shape, self._dtype = [self._shape[0] + len(array), *array.shape[1:]], array.dtype
        self._handle.write(array.data)

    def close(self) -> None:
        """Write the header of npy format 1.0, its length fixed in advance as the number of rows was unknown."""
        about = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': {tuple(self._shape)}, }}"
        start = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._handle.seek(0)
        self._handle.write(start + about.ljust(_HEADER_BYTES - 11).encode() + b"\n")
        self._handle.close()


def open_rows(path: Path) -> Tensor:
    """A memory-mapped .npy file; what is changed in the tensor never reaches the file."""
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def gather_rows(
    columns: Sequence[Tensor], indices: Sequence[int] | None, paths: Sequence[Path] | None, device: torch.device
) -> list[Tensor]:
    """The rows of all processes on every process, ordered by index and each index once; counts may differ.

    Args:
        columns: This process's columns, all of one length; empty where it has no rows.
        indices: Index of each row in the data set; None: processes one after the other.
        paths: .npy files for the result, written by rank 0 and seen by all; None: in memory.
        device: Where the backend wants tensors to be.
    """
    mine = None if indices is None else [int(index) for index in indices]
    rows = len(columns[0]) if columns else 0
    shapes = [(column.shape[1:], column.dtype) for column in columns]
    everyone: list[tuple[int, list[tuple[torch.Size, torch.dtype]], list[int] | None]]
    everyone = [(0, [], None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (rows, shapes, mine))
    counts = [count for count, _, _ in everyone]
    if any(given is not None and len(given) != count for count, _, given in everyone):
        given = [(count, None if indices is None else len(indices)) for count, _, indices in everyone]
        raise ValueError(
            f"there must be one index for every image of the loader, but (images, indices) per process are {given}."
        )
    shapes = next((shapes for _, shapes, _ in everyone if shapes), [])
    if not shapes:
        raise ValueError("the loaders of all processes are empty.")
    places, total = _places(counts, [given for _, _, given in everyone])

    writes = paths is None or dist.get_rank() == 0
    results = []
    for number, (shape, dtype) in enumerate(shapes):
        path = None if paths is None else paths[number]
        result = _empty_rows((total, *shape), dtype, path) if writes else None
        for rank, place in enumerate(places):
            for keep, block in _blocks(columns[number] if columns else None, rank, counts[rank], shape, dtype, device):
                position = place[keep : keep + len(block)]
                if result is not None:
                    result[position[position >= 0]] = block[position >= 0]
        if result is not None:
            results.append(result)
    return results


def _places(counts: list[int], given: list[list[int] | None]) -> tuple[list[Tensor], int]:
    """Row of the result for each row of each process, -1 for one that is there already; and the number of rows."""
    if any(indices is None for indices in given):
        ends = torch.tensor(counts, device="cpu").cumsum(0).tolist()
        rows = [torch.arange(end - count, end, device="cpu") for count, end in zip(counts, ends, strict=True)]
        return rows, sum(counts)
    flat = torch.tensor([index for indices in given for index in indices or []], device="cpu")
    order = flat.sort(stable=True)
    is_first = torch.ones(len(flat), dtype=torch.bool, device="cpu")
    is_first[1:] = order.values[1:] != order.values[:-1]
    place = torch.empty_like(flat)
    place[order.indices] = torch.where(is_first, is_first.cumsum(0) - 1, -1)
    return list(place.split(counts)), int(is_first.sum())


def _blocks(
    column: Tensor | None, rank: int, count: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Send (or receive) the rows of one process, block by block; yields the first row's number and the rows."""
    step = max(1, _BLOCK_BYTES // max(1, shape.numel() * dtype.itemsize))
    for start in range(0, count, step):
        size = min(step, count - start)
        if rank == dist.get_rank() and column is not None:
            block = column[start : start + size].to(device).contiguous()
        else:
            block = torch.empty((size, *shape), dtype=dtype, device=device)
        dist.broadcast(block, src=rank)
        yield start, block.cpu()


def _empty_rows(shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> Tensor:
    if path is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    numpy_dtype = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    return torch.from_numpy(np.lib.format.open_memmap(path, mode="w+", dtype=numpy_dtype, shape=shape))
