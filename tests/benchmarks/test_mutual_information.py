"""mutual_information against a loop over scikit-learn's mutual_info_classif; reach: 20 times as fast.

Run: pytest tests/benchmarks/test_mutual_information.py --benchmark-only --benchmark-group-by=param:shape
With 100 classes the loop takes about seven minutes, so scikit-learn runs on 2 of them and `extra_info` holds the
factor: its time is proportional to the number of classes, as it does the same work for each.
"""

import re
import time
from pathlib import Path

import pytest
import torch
from reference.mutual_information import mutual_information as reference

from timm_csg.metrics.information import mutual_information

SHAPES = {"10000x64x10": (10000, 64, 10, 10), "5000x512x100": (5000, 512, 100, 2)}  # the last: classes given to sklearn


def relu_features(samples, filters, num_classes):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, num_classes, (samples,), generator=generator)
    own = targets[:, None] == torch.arange(filters) % num_classes
    return (torch.randn(samples, filters, generator=generator) + own).relu(), targets


@pytest.mark.parametrize("shape", SHAPES)
def test_mutual_information(benchmark, shape):
    samples, filters, num_classes, _ = SHAPES[shape]
    features, targets = relu_features(samples, filters, num_classes)
    benchmark.pedantic(mutual_information, (features, targets, num_classes), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_loop_over_scikit_learn(benchmark, shape):
    samples, filters, num_classes, timed_classes = SHAPES[shape]
    features, targets = relu_features(samples, filters, num_classes)
    benchmark.extra_info["multiply_by"] = num_classes / timed_classes
    benchmark.pedantic(reference, (features, targets, timed_classes), rounds=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_twenty_times_as_fast(benchmark, shape):
    samples, filters, num_classes, _ = SHAPES[shape]
    features, targets = relu_features(samples, filters, num_classes)
    start = time.perf_counter()  # a part of the loop, in the same minute as ours
    reference(features[:, :16], targets, 2)
    loop = (time.perf_counter() - start) * num_classes / 2 * filters / 16
    benchmark.pedantic(mutual_information, (features, targets, num_classes), rounds=5, warmup_rounds=1)
    ratio = loop / benchmark.stats.stats.median
    benchmark.extra_info["times_as_fast"] = round(ratio)
    assert ratio >= 20


GROWTH = [
    *((samples, 64, 10) for samples in (2500, 5000, 10000, 20000, 40000)),
    *((10000, filters, 10) for filters in (16, 32, 128)),
    *((10000, 64, num_classes) for num_classes in (2, 30, 100, 300, 1000)),
]


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("shape", GROWTH, ids=lambda shape: "x".join(map(str, shape)))
def test_processor_time_by_samples_filters_and_classes(benchmark, shape):
    samples, filters, num_classes = shape
    features, targets = relu_features(samples, filters, num_classes)
    benchmark.pedantic(mutual_information, (features, targets, num_classes), rounds=2, warmup_rounds=1)


def resident_mib(name):
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("filters", [512, 2048])
def test_as_many_images_and_classes_as_imagenet_validates_with(benchmark, filters):
    features, targets = relu_features(50000, filters, 1000)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_mib("VmRSS")
    mi = benchmark.pedantic(mutual_information, (features, targets, 1000), rounds=1)
    grown = resident_mib("VmHWM") - before
    benchmark.extra_info["peak memory grew by MiB"] = round(grown)
    print(f"{filters} filters: {benchmark.stats.stats.max:.0f} s of processor time, {grown:.0f} MiB more memory")
    assert mi.shape == (1000, filters)
