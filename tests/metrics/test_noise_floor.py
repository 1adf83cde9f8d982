"""Numbers with shuffled labels: against all orders there are, and the estimator's bias on few images."""

import itertools
import math

import pytest
import torch

from timm_csg import metrics


def test_mean_and_deviation_are_those_over_all_orders():
    targets, weights = torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 2.0, 4.0, 8.0])

    def statistic(labels):
        return float((labels * weights).sum())

    values = torch.tensor([statistic(targets[list(order)]) for order in itertools.permutations(range(4))])
    found = metrics.noise_floor(statistic, targets, shuffles=4000)
    assert found.mean == pytest.approx(float(values.mean()), abs=0.3)
    assert found.deviation == pytest.approx(float(values.std(correction=0)), rel=0.05)


def test_classes_keep_their_sizes():
    targets = torch.tensor([0] * 5 + [1] * 2 + [2])
    counts = []
    metrics.noise_floor(lambda shuffled: counts.append(torch.bincount(shuffled).tolist()) or 0.0, targets)
    assert counts == [[5, 2, 1]] * 5


def test_floor_of_the_score_is_above_zero_and_falls_with_images():
    floors = []
    for samples in (30, 300):
        generator = torch.Generator().manual_seed(0)
        features, targets = torch.rand(samples, 20, generator=generator), torch.arange(samples) % 3

        def score(labels, features=features):
            return metrics.mutual_information_score(metrics.mutual_information(features, labels, 3))

        floors.append(metrics.noise_floor(score, targets, shuffles=3).mean)
    assert floors[0] > 3 * floors[1] > 0


def test_one_shuffle_has_no_deviation_and_none_is_refused():
    found = metrics.noise_floor(lambda labels: 1.0, torch.tensor([0, 1]), shuffles=1)
    assert found.mean == 1.0
    assert math.isnan(found.deviation)
    with pytest.raises(ValueError, match="shuffles must be a whole number"):
        metrics.noise_floor(lambda labels: 1.0, torch.tensor([0, 1]), shuffles=0)
