"""Processes for tests: forks of one that has imported PyTorch, timm and the package, so that each starts at once."""

import multiprocessing
import os

import torch.multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "timm", "timm_csg.cli.train"])


def run_in_processes(function, *arguments, count=1):
    """Call ``function(rank, *arguments)`` in new processes, in this one's environment; raises if one does."""
    every = (function, dict(os.environ), *arguments)
    torch.multiprocessing.start_processes(_in_environment, every, nprocs=count, start_method="forkserver")


def _in_environment(rank, function, environment, *arguments):
    os.environ.clear()  # that of the first process that was started, by whichever test
    os.environ.update(environment)
    function(rank, *arguments)
