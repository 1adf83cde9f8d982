"""What DifferentiationTask costs, as ratios to timm's ClassificationTask; goals: standard path 1.005, gated path 1.02.

Run: OMP_NUM_THREADS=1 pytest tests/benchmarks/test_task_overhead.py --benchmark-only --benchmark-columns=median -s

A step is what timm's train.py does: task, backward, optimizer, zero_grad, update_ema. In each round all tasks take a
step, in changing order; a ratio is the median over rounds of a task's time to that of ClassificationTask in the same
round. ClassificationTask is there twice: the ratio of the two is the error of this measurement. Times are those of the
process, not of the clock, so that other programs disturb less. Reported and not asserted.
"""

import copy
import random
import statistics
import time

import timm
import torch
from timm.task import ClassificationTask

import timm_csg
from timm_csg.integrations.timm_task import DifferentiationTask

MODEL, BATCH, SIZE, SECONDS = "resnet18", 16, 128, 240
SCHEDULES = {
    "standard path": timm_csg.Alternating(period=1, gated=0, unit="step"),
    "gated path": timm_csg.Alternating(period=1, gated=1, unit="step"),
    "both paths": timm_csg.Joint(),
}


def step_of(task):
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-4, momentum=0.9)
    if isinstance(task, DifferentiationTask):
        task.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator), torch.arange(BATCH) % 10
    task.get_trainable_module().train()
    task.setup_ema()

    def step():
        start = time.process_time()
        task(images, targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        return time.process_time() - start

    return step


def test_training_step_of_the_task(benchmark):
    plain, criterion = timm.create_model(MODEL, num_classes=10), torch.nn.CrossEntropyLoss()
    steps = {
        name: step_of(ClassificationTask(copy.deepcopy(plain), criterion, verbose=False))
        for name in ("ClassificationTask", "ClassificationTask again")
    }
    for name, schedule in SCHEDULES.items():
        model = timm_csg.differentiate(copy.deepcopy(plain), 10)
        steps[name] = step_of(DifferentiationTask(model, criterion, schedule=schedule, verbose=False))
    for step in steps.values():
        step()
    order, rounds, end = list(steps), [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        random.Random(len(rounds)).shuffle(order)
        times = {name: steps[name]() for name in order}
        rounds.append({name: times[name] / times["ClassificationTask"] for name in times})
    for name in [*steps][1:]:
        ratios = sorted(one[name] for one in rounds)
        middle, spread = statistics.median(ratios), statistics.quantiles(ratios, n=4)
        error = (spread[2] - spread[0]) / 1.349 * 1.253 / len(ratios) ** 0.5  # of a median, from the quartiles
        benchmark.extra_info[name] = round(middle, 4)
        print(f"\n{name}: {middle:.4f} x ClassificationTask, standard error {error:.4f}, {len(ratios)} rounds")
    benchmark.pedantic(steps["gated path"], rounds=2)
