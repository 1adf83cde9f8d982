"""Processes for tests: forks of one that has imported PyTorch, timm and the package, so that each starts at once."""

import multiprocessing
import os
import socket

import torch.multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "timm", "timm_csg.cli.train"])


def run_in_processes(function, *arguments, count=1):
    """Call ``function(rank, *arguments)`` in new processes, in this one's environment; raises if one does."""
    every = (function, dict(os.environ), *arguments)
    torch.multiprocessing.start_processes(_in_environment, every, nprocs=count, start_method="forkserver")


def free_port():
    """A port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def be_one_of(rank, count, port):
    """From now on this process is one of several, as if ``srun`` had started them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")


def _in_environment(rank, function, environment, *arguments):
    os.environ.clear()  # that of the first process that was started, by whichever test
    os.environ.update(environment)
    function(rank, *arguments)
