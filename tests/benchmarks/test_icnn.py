"""The part loss against a literal transcription of its formula, and the mask's share of a training step.

Run: pytest tests/benchmarks/test_icnn.py --benchmark-only --benchmark-columns=median -s

Reach: 10 times as fast and a twentieth of the memory on maps [16, 512, 14, 14], forward and backward. The literal form
multiplies every map with every template, gigabytes at its peak, so for the memory each form runs in its own process.
"""

import copy
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from benchmarks.test_overhead import BATCH, MODEL, SIZE, paired_ratio, report, training_step

import timm_csg
from timm_csg import ICNNConfig, InterpretableFilters
from timm_csg.mechanisms.templates import template_table

SHAPE = (16, 512, 14, 14)


def sample():
    maps = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return maps, torch.arange(SHAPE[0]) % 6


def ours(maps, targets):
    mechanism = InterpretableFilters(SHAPE[1], 6, ICNNConfig()).train()
    mechanism.losses(maps, targets, head=None)["part"].backward()


def literal(maps, targets):
    """-sum_T p(T) sum_x p(x|T) log(p(x|T) / p(x)), every product of a map and a template written down."""
    size = maps.shape[2] * maps.shape[3]
    table = template_table(*maps.shape[2:], 4.0)
    templates = 0.5 / size * torch.cat([table, -torch.ones(1, size)]).reshape(-1, *maps.shape[2:])
    fits = (maps[:, :, None] * templates).sum(dim=(3, 4))  # [images, filters, templates]
    z = fits.exp().sum(dim=0).detach()
    given = fits.exp() / z
    p_x = (given / len(templates)).sum(dim=2, keepdim=True)
    loss = -(given / len(templates) * (given / p_x).log()).sum(dim=(0, 2))
    strength = maps.detach().amax(dim=(2, 3)).mean(dim=0)
    ((loss * strength).sum() / strength.sum()).backward()


def print_peak_memory(form):
    """MiB by which the process grew at its peak while the form ran; Linux only."""
    form(torch.rand(2, 512, 4, 4).requires_grad_(), torch.arange(2))  # what libraries set up once does not count
    maps, targets = sample()

    def memory(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS:")
    form(maps, targets)
    print(memory("VmHWM:") - before)


def test_both_give_the_same_gradient():
    gradients = []
    for form in (ours, literal):
        maps, targets = sample()
        form(maps, targets)
        gradients.append(maps.grad)
    cosine = torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    assert cosine > 0.999


def test_ten_times_as_fast_as_the_formula(benchmark):
    maps, targets = sample()
    times = {}
    for form in (ours, literal):
        form(*sample())
        start = time.perf_counter()
        form(*sample())
        times[form] = time.perf_counter() - start
    ratio = times[literal] / times[ours]
    benchmark.extra_info["times_as_fast"] = round(ratio, 1)
    print(f"\npart loss: {ratio:.1f} times as fast as the formula ({times[ours]:.3f} s, {times[literal]:.3f} s)")
    benchmark.pedantic(ours, (maps, targets), rounds=3, warmup_rounds=1)
    assert ratio >= 10


def test_a_twentieth_of_the_memory_of_the_formula(benchmark):
    def peak(form):
        code = "import sys; sys.path.insert(0, 'tests'); import benchmarks.test_icnn as t; t.print_peak_memory(t.FORM)"
        found = subprocess.run(
            [sys.executable, "-c", code.replace("FORM", form)], capture_output=True, text=True, check=True
        )
        return float(found.stdout)

    needed = {form: peak(form) for form in ("ours", "literal")}
    ratio = needed["literal"] / needed["ours"]
    benchmark.extra_info["times_the_memory"] = round(ratio, 1)
    print(f"\npart loss: {needed['ours']:.0f} MiB, formula {needed['literal']:.0f} MiB, {ratio:.1f} times as much")
    benchmark.pedantic(ours, sample(), rounds=1)
    assert ratio >= 20


def test_training_step_with_mask_and_loss(benchmark):
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator), torch.arange(BATCH) % 10
    plain = timm.create_model(MODEL, num_classes=10)
    baseline = training_step(plain, images=images, targets=targets)
    for name, schedule in (
        ("mask", timm_csg.Alternating(period=1, gated=0)),
        ("mask and loss", timm_csg.Joint()),
    ):
        model = timm_csg.differentiate(copy.deepcopy(plain), 10, "icnn")
        candidate = training_step(model, schedule, images=images, targets=targets)
        report(benchmark if name == "mask and loss" else _Quiet(), f"training step, {name}",
               paired_ratio(candidate, baseline, rounds=6), candidate)  # fmt: skip


class _Quiet:
    """Stands in for the benchmark fixture, which can be used once a test."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, *_, **__):
        pass
