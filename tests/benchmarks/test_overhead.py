"""What differentiating costs, as ratios to plain timm measured side by side; the goals are in each test's name.

Run: pytest tests/benchmarks/test_overhead.py --benchmark-only --benchmark-columns=median -s

Candidate and baseline take turns, so that a drifting machine slows both alike; the ratio is the median over pairs. It
goes to ``extra_info`` and to the terminal and is not asserted: the last half per cent depends on the machine.
"""

import copy
import statistics
import subprocess
import sys
import time

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import timm_csg
from timm_csg.cli.distributed import Processes
from timm_csg.cli.engine import Training
from timm_csg.cli.settings import TrainSettings
from timm_csg.recipes import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL, BATCH, SIZE = ("resnet50", 128, 224) if DEVICE == "cuda" else ("resnet18", 32, 128)
ASSIGNED = RECIPES["assigned"].mechanism


def paired_ratio(candidate, baseline, rounds):
    """Median over rounds of candidate time / baseline time, the two taking turns, the first round not counted."""
    ratios = []
    for index in range(rounds + 1):
        times = []
        for run in (candidate, baseline) if index % 2 else (baseline, candidate):
            start = time.perf_counter()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1] if index % 2 else times[1] / times[0])
    return statistics.median(ratios[1:])


def report(benchmark, name, ratio, candidate):
    benchmark.extra_info["ratio_to_plain_timm"] = round(ratio, 4)
    print(f"\n{name}: {ratio:.4f} x plain timm")
    benchmark.pedantic(candidate, rounds=2)


def training_step(model, *targets_and_paths, targets, images):
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=1e-4), lr=1e-4, momentum=0.9)
    loop = timm_csg.TrainingMixin()
    differentiated = timm_csg.is_differentiated(model)
    if differentiated:
        loop.schedule = targets_and_paths[0]
        loop.attach(optimizer, model)
    criterion = torch.nn.functional.cross_entropy
    model.train()

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
            if differentiated:
                loss = loop.losses(model, images, targets, criterion)["loss"]
            else:
                loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
    return images.to(DEVICE), (torch.arange(BATCH) % 10).to(DEVICE)


@pytest.fixture
def plain():
    return timm.create_model(MODEL, num_classes=10).to(DEVICE, memory_format=torch.channels_last)


def test_eval_forward_standard_path_at_most_1_005(benchmark, plain, batch):
    differentiated = timm_csg.differentiate(copy.deepcopy(plain), 10).eval()
    plain.eval()
    with torch.inference_mode():
        ratio = paired_ratio(lambda: differentiated(batch[0]), lambda: plain(batch[0]), rounds=40)
        report(benchmark, "eval forward, standard path", ratio, lambda: differentiated(batch[0]))


GATED = timm_csg.Alternating(period=1, gated=1)


@pytest.mark.parametrize(
    ("name", "mechanism", "schedule"),
    [
        ("gated path, label gate: at most 1.02", timm_csg.CSGConfig(), GATED),
        ("both paths, label gate: at most 1.05", timm_csg.CSGConfig(), timm_csg.Joint()),
        ("both paths, assigned recipe: at most 1.05", ASSIGNED, timm_csg.Joint()),
    ],
)
def test_training_step(benchmark, plain, batch, name, mechanism, schedule):
    model = timm_csg.differentiate(copy.deepcopy(plain), 10, mechanism)
    candidate = training_step(model, schedule, images=batch[0], targets=batch[1])
    baseline = training_step(plain, images=batch[0], targets=batch[1])
    report(benchmark, f"training step, {name}", paired_ratio(candidate, baseline, rounds=20), candidate)


@pytest.mark.parametrize("recipe", ["standard", "assigned"])
def test_steps_of_timm_csg_train_at_most_1_02_and_1_05(benchmark, tmp_path, batch, recipe):
    options = {"model": MODEL, "data": "folder:.", "img_size": SIZE, "batch_size": BATCH, "device": DEVICE}
    settings = TrainSettings(**options, opt="sgd", lr=1e-4).resolved()
    batches = [batch] * 2
    processes = Processes(device=torch.device(DEVICE))
    training = Training(recipe, RECIPES.get(recipe), settings, 10, len(batches), tmp_path / "state.pt", processes)
    training.assign(batches)
    training.set_epoch(0)
    plain = timm.create_model(MODEL, num_classes=10).to(DEVICE).train()
    optimizer = create_optimizer_v2(plain, opt="sgd", lr=1e-4, weight_decay=settings.weight_decay)

    def candidate():
        training._train_epoch(batches, lambda path: None)

    def baseline():
        for images, targets in batches:
            torch.nn.functional.cross_entropy(plain(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    report(benchmark, f"steps of timm-csg train, {recipe}", paired_ratio(candidate, baseline, rounds=20), candidate)


def test_assign_filters_at_most_1_05_of_an_evaluation_pass(benchmark, plain, batch):
    model = timm_csg.differentiate(copy.deepcopy(plain), 10, ASSIGNED).eval()
    loader = [batch] * 4

    def evaluate():
        with torch.inference_mode():
            for images, targets in loader:
                (plain(images).argmax(dim=1) == targets).sum().item()

    plain.eval()
    ratio = paired_ratio(lambda: timm_csg.assign_filters(model, loader), evaluate, rounds=20)
    report(benchmark, "assign_filters against an evaluation pass", ratio, evaluate)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny", "efficientnet_b0", "vit_small_patch16_224"])
def test_differentiate_at_most_a_tenth_of_create_model(benchmark, name):
    def create():
        timm.create_model(name, num_classes=10)

    models = [timm.create_model(name, num_classes=10) for _ in range(6)]
    ratio = paired_ratio(lambda: timm_csg.differentiate(models.pop(), 10), create, rounds=5)
    print(f"\ndifferentiate {name}: {ratio:.4f} x create_model")
    benchmark.extra_info["ratio_to_create_model"] = round(ratio, 4)
    benchmark.pedantic(create, rounds=1)


def test_import_at_most_1_1_times_import_timm(benchmark):
    def imports(package):
        subprocess.run([sys.executable, "-c", f"import {package}"], check=True)

    ratio = paired_ratio(lambda: imports("timm_csg"), lambda: imports("timm"), rounds=7)
    print(f"\nimport timm_csg: {ratio:.3f} x import timm")
    benchmark.extra_info["ratio_to_import_timm"] = round(ratio, 3)
    benchmark.pedantic(imports, ("timm_csg",), rounds=1)
