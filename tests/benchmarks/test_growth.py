"""Processor time and memory of every metric that looks at classes, with 1,000 and 10,000 of them.

Run: pytest tests/benchmarks/test_growth.py --benchmark-only -s
20,000 images and 512 filters where features are enough; where a model runs, one batch of 8 images of a tiny one, whose
96 (64) filters belong to as many classes.
"""

import re
import time
from pathlib import Path

import pytest
import timm
import torch

from timm_csg import measuring, metrics

SAMPLES, FILTERS, IMAGES = 20_000, 512, 8


class Inputs:
    """What the metrics are given, for a number of classes."""

    def __init__(self, classes):
        generator = torch.Generator().manual_seed(0)
        self.classes = classes
        self.targets = torch.arange(SAMPLES) % classes
        self.owners = torch.arange(FILTERS) % classes
        own = self.targets[:, None] == self.owners
        self.features = (torch.randn(SAMPLES, FILTERS, generator=generator) + 3 * own).relu()
        self.matrix = torch.nn.functional.one_hot(self.owners, classes).T.float()
        self.scores = torch.rand(classes, FILTERS, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(classes, FILTERS, generator=generator)
        self.boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]] * IMAGES)

    def loader(self):
        return [(torch.rand(IMAGES, 3, 32, 32), torch.arange(IMAGES) * (self.classes // IMAGES))]

    def model(self, name="test_resnet"):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=self.classes).eval()

    def ablation(self):
        after = torch.full((self.classes, self.classes), 0.9, dtype=torch.float64)
        return metrics.Ablation(after[0].clone(), after.fill_diagonal_(0))

    def peaks(self, images=2000):
        place = torch.rand(images, FILTERS, 2) * 32
        return metrics.Peaks(torch.rand(images, FILTERS), place, self.targets[:images], (32, 32))


def relearn(given):
    """One probe of all classes on 16 filters, of the two that ``before`` and a class need."""
    if given.classes > 1000:
        pytest.skip("a probe of 10,000 classes takes more than ten minutes")
    few = given.features[:, :16]
    return metrics.relearning(few, given.targets, given.owners[:16], (few, given.targets), classes=[0])


def ablate(given, name):
    model = given.model(name)
    return measuring.ablate(model, given.loader(), torch.arange(model.num_features), given.classes)


METRICS = {
    "mutual_information": lambda given: metrics.mutual_information(given.features, given.targets, given.classes),
    "mutual_information_score": lambda given: metrics.mutual_information_score(given.scores),
    "mutual_information_bound": lambda given: metrics.mutual_information_bound(given.targets, given.classes),
    "mutual_information_per_class": lambda given: metrics.mutual_information_per_class(given.scores),
    "mutual_information_per_filter": lambda given: metrics.mutual_information_per_filter(given.scores),
    "purity": lambda given: metrics.purity(given.features, given.targets, given.classes),
    "class_selectivity": lambda given: metrics.class_selectivity(given.features, given.targets, given.classes),
    "class_correlation": lambda given: metrics.class_correlation(given.features, given.targets, given.classes),
    "verdict": lambda given: metrics.verdict(
        given.matrix, given.features, given.targets, accuracy=0.9, removal=given.ablation()
    ),
    "gate_counts": lambda given: metrics.gate_counts(given.matrix),
    "owner_agreement": lambda given: metrics.owner_agreement(given.matrix, given.scores),
    "binarity": lambda given: metrics.binarity(given.matrix),
    "top_filters": lambda given: metrics.top_filters(given.scores, 5),
    "activation_similarity": lambda given: metrics.summarize_similarity(
        metrics.activation_similarity(given.features), given.owners
    ),
    "ablate_linear": lambda given: metrics.ablate_linear(
        given.features[:256], given.targets[:256], given.weight, None, given.owners
    ),
    "ablate, linear head": lambda given: ablate(given, "test_resnet"),
    "ablate, other head": lambda given: ablate(given, "test_convnext"),
    "relearning of one class": relearn,
    "contrastiveness": lambda given: metrics.contrastiveness(given.features[:, :16]),
    "class_independence": lambda given: metrics.class_independence(given.features, given.targets, given.classes),
    "mono_score": lambda given: metrics.mono_score(given.features, given.features),
    "location_instability": lambda given: metrics.location_instability(
        given.peaks(), torch.rand(2000, 1, 2), given.classes
    ),
    "whole_image": lambda given: metrics.whole_image(given.boxes, given.loader()[0][1], (32, 32)),
    "cam": lambda given: measuring.cam_localisation(given.model(), given.loader(), given.boxes),
    "activmap": lambda given: measuring.activmap(given.model(), given.loader(), given.boxes),
    "gradmap": lambda given: measuring.gradmap(given.model(), given.loader(), given.boxes, filters_per_class=2),
}


def resident_mib(name):
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


@pytest.fixture(scope="module", params=[1_000, 10_000])
def inputs(request):
    return Inputs(request.param)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", METRICS)
def test_growth_with_the_number_of_classes(benchmark, inputs, name):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_mib("VmRSS")
    benchmark.pedantic(METRICS[name], (inputs,), rounds=1)
    grown = resident_mib("VmHWM") - before
    benchmark.extra_info["peak memory grew by MiB"] = round(grown)
    print(f"{inputs.classes} classes, {name}: {benchmark.stats.stats.max:.2f} s, {grown:.0f} MiB")
