"""Several processes that train one model: ``torchrun --nproc-per-node 4 -m timm_csg train ...``.

Every process computes the gradient of its share of each batch, and DistributedDataParallel averages them, so that
weights and gates are the same everywhere. Only the first process prints and touches the run folder; whichever process
fails first reports why, once, and all of them end.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import Sampler

_T = TypeVar("_T")
# What the survivors get from gloo or NCCL when another process is gone.
_OTHER_GONE = re.compile("closed by peer|reset by peer|Broken pipe|remote process exited|timed out", re.IGNORECASE)


@dataclass(frozen=True)
class Processes:
    """The processes of a training, and which of them this is. One process is the ordinary case.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        device: Of this process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, find_unused_parameters: bool) -> nn.Module:
        """The model in DistributedDataParallel; the model itself in one process."""
        if self.count == 1:
            return model
        ids = None if self.device.type == "cpu" else [self.device]
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=find_unused_parameters)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in double precision."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.cpu()]

    def from_first(self, value: _T) -> _T:
        """The first process's value, in all of them; tensors come on the CPU."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def complete_(self, rows: Tensor) -> None:
        """Give all processes all rows of a tensor on the CPU, in place; each has its own, and 0 in those of others."""
        for part in rows.split(1024) if self.count > 1 else ():
            total = part.to(self.device, torch.float32 if part.is_floating_point() else part.dtype)
            dist.all_reduce(total)
            part.copy_(total)

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the same buffers: BatchNorm's statistics averaged, the rest as in the first process."""
        if self.count == 1:
            return
        distribute_bn(model, self.count, reduce=True)
        for name, buffer in model.named_buffers():
            if not name.endswith(("running_mean", "running_var")):
                dist.broadcast(buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer, 0)

    def wait_for_first(self, step: str) -> None:
        """Hold the other processes until the first one comes here; ``step`` is a name used once.

        The others ask the store now and then, as a barrier would give up after minutes.
        """
        store = _store()
        if self.is_first and store is not None:
            store.set(step, "done")
        while store is not None and not store.check([step]):
            time.sleep(0.1)


def is_several() -> bool:
    """Whether torchrun, or srun with MASTER_ADDR and MASTER_PORT set, started more than one process."""
    return "MASTER_ADDR" in os.environ and bool(is_distributed_env())


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The process group, for the time of the block.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; with CUDA each process uses the GPU of its local rank.

    Raises:
        ValueError: If the device is not there, or there are more processes than GPUs.
    """
    if not is_several():
        yield Processes(device=find_device(device))
        return
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]
    local_rank, _, _ = world_info_from_env()
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own, only {torch.cuda.device_count()} found; "
            "start one process per GPU (torchrun --nproc-per-node gpu), or use --device cpu."
        )
    find_device(kind)
    found = init_distributed_device_so(kind)
    processes = Processes(found["global_rank"], found["world_size"], torch.device(found["device"]))
    yield processes
    processes.sum([0])  # none leaves before all are done: without torchrun the first one holds the store that they ask
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def find_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        ValueError: If it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {error}") from error
    return device


class GlobalBatches(Sampler[list[int]]):
    """This process's share of every batch.

    The batches of all processes together are those that one process draws: same seed, same order, same incomplete last
    batch left out.

    Args:
        length: Samples in the data set.
        batch_size: Samples in a batch, of all processes together; a multiple of their number.
        seed: Of the training.
        processes: Who shares the batches.

    Example:
        >>> parts = [list(GlobalBatches(5, 4, seed=0, processes=Processes(rank, 2))) for rank in (0, 1)]
        >>> [len(part) for part in parts[0]], len(set(parts[0][0] + parts[1][0]))
        ([2], 4)
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, processes: Processes) -> None:
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0
        share = batch_size // processes.count
        self.share = slice(processes.rank * share, (processes.rank + 1) * share)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.length, self.seed + self.epoch + 1)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.share]


def epoch_order(length: int, seed: int) -> list[int]:
    """The order in which a shuffling DataLoader of one process visits samples after ``torch.manual_seed(seed)``.

    It draws twice from the global generator: a seed for its workers, and one for the order.
    """
    generator = torch.Generator().manual_seed(seed)
    _, of_order = (int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator)) for _ in range(2))
    order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(of_order), device="cpu").tolist()
    return order


def told_by_first(name: str, make: Callable[[], str]) -> str:
    """A text that only the first process can produce, in all of them; works before the process group exists."""
    store = _store()
    if store is None:
        return make()
    if world_info_from_env()[1] == 0:
        store.set(name, make())
    return str(store.get(name).decode())


@functools.cache
def first_to_fail() -> bool:
    """Whether this process reports why training ends: the first one to ask does."""
    try:
        store = _store()
        first: bool = store is None or store.add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        first = world_info_from_env()[1] == 0
    return first


def run_together(run: Callable[[], int]) -> int:
    """Run a command in each of several processes, with one voice.

    Args:
        run: The command; its errors go through ``first_to_fail``.

    Returns:
        0. With any other status the process ends here, without waiting for what the others will never send.
    """
    _, rank, count = world_info_from_env()
    said, terminal = io.StringIO(), sys.stderr
    with contextlib.ExitStack() as silence:
        if rank != 0:
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
            silence.enter_context(contextlib.redirect_stderr(said))
        try:
            status = run()
        except KeyboardInterrupt:
            status = 130
        except Exception as error:
            status = 1
            gone = isinstance(error, RuntimeError) and _OTHER_GONE.search(str(error))
            said.write(_GONE if gone else f"process {rank} of {count}:\n{traceback.format_exc()}")
    if status == 0:
        return 0
    if first_to_fail():
        terminal.write(said.getvalue())
        terminal.flush()
    sys.stdout.flush()
    for loading in multiprocessing.active_children():  # one that had not begun yet would never notice and live on
        loading.kill()
    os._exit(status)


_GONE = (
    "timm-csg: another process of this training exited unexpectedly (killed, or out of memory?). "
    "The last complete epoch is saved; continue with --resume.\n"
)


@functools.cache
def _store() -> Any:
    """The store that torchrun or the first process keeps for all; None in one process."""
    if not is_several():
        return None
    _, rank, count = world_info_from_env()
    store, *_ = next(iter(rendezvous("env://", rank, count)))
    return dist.PrefixStore(f"timm_csg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
