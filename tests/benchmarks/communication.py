"""Bytes that a training step sends between processes, and what finding unused parameters costs; on the CPU with gloo.

Run: torchrun --nproc-per-node 2 tests/benchmarks/communication.py [MODEL ...]

DistributedDataParallel hands its buckets to a hook, which adds up their sizes: measured. What a ring of GPUs would send
and how long it would take follows from these bytes by arithmetic and is marked so.
"""

import statistics
import sys
import time

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import timm_csg
from timm_csg.cli.distributed import joined
from timm_csg.recipes import RECIPES

STEPS = 12
PATHS = ("standard", "gated", "both")
GIGABYTES_PER_SECOND = {"400 Gbit/s network": 50, "NVLink, 450 GB/s": 450}


def differentiated(name):
    model = timm.create_model(name, num_classes=1000)
    return timm_csg.differentiate(model, mechanism=RECIPES["assigned"].mechanism)


def counting(sizes):
    """A communication hook that averages as DDP does and notes the bytes of every bucket."""

    def hook(group, bucket):
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    return hook


def step(wrapped, path, images, targets):
    paths = ("standard", "gated") if path == "both" else (path,)
    outputs = wrapped(images, targets, paths=paths)
    logits = [part for part in (outputs.standard, outputs.gated) if part is not None]
    loss = sum(nn.functional.cross_entropy(part, targets) for part in logits) + sum(outputs.losses.values())
    loss.backward()
    wrapped.zero_grad()


def bytes_of_a_step(name, path):
    model = differentiated(name)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=path != "both")
    sizes = []
    wrapped.register_comm_hook(None, counting(sizes))
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    step(wrapped, path, images, targets)  # the first step still has the buckets in another order
    sizes.clear()
    step(wrapped, path, images, targets)
    gate = model.mechanism.gate.numel() * 4
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return sum(sizes), len(sizes), gate, buffers


def cost_of_finding_unused(name):
    """Seconds of a step on both paths without and with find_unused_parameters, median over pairs taking turns."""
    model = differentiated(name)
    images, targets = torch.rand(8, 3, 64, 64), torch.arange(8)
    wrapped = [nn.parallel.DistributedDataParallel(model, find_unused_parameters=find) for find in (False, True)]
    times = [[], []]
    for _ in range(STEPS):
        for kind, candidate in enumerate(wrapped):
            dist.barrier()
            start = time.perf_counter()
            step(candidate, "both", images, targets)
            times[kind].append(time.perf_counter() - start)
    ratio = statistics.median(found / plain for plain, found in zip(*times, strict=True))
    return statistics.median(times[0]), ratio


def report(name):
    lines = []
    for path in PATHS:
        sent, buckets, gate, buffers = bytes_of_a_step(name, path)
        lines.append(
            f"{name}, {path}: {sent / 1e6:.2f} MB of gradients in {buckets} buckets (measured), gate "
            f"{gate / 1e6:.2f} MB = {gate / sent:.1%}; buffers {buffers / 1e6:.2f} MB"
        )
    for count in (8, 64):
        share = 2 * (count - 1) / count * sent
        times = ", ".join(f"{share / rate / 1e6:.2f} ms over {net}" for net, rate in GIGABYTES_PER_SECOND.items())
        lines.append(f"{name}, {count} GPUs: each sends {share / 1e6:.1f} MB a step (arithmetic): {times}")
    seconds, ratio = cost_of_finding_unused(name)
    lines.append(f"{name}: step {seconds * 1e3:.0f} ms on the CPU, with find_unused_parameters {ratio:.3f} times that")
    return lines


if __name__ == "__main__":
    torch.manual_seed(0)
    with joined("cpu") as processes:
        for model_name in sys.argv[1:] or ["resnet18", "resnet50"]:
            found = report(model_name)
            if processes.is_first:
                sys.stdout.write("\n".join(found) + "\n")
