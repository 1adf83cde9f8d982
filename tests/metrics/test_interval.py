"""Intervals cover what they claim to cover."""

import math

import pytest
import torch

from timm_csg import metrics
from timm_csg.metrics.interval import random_half


def simulated(samples, seed):
    """Four correlated filters, three classes of equal size."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % 3
    own = (targets[:, None] == torch.arange(4) % 3).float()
    shared = torch.randn(samples, 1, generator=generator)
    return (0.7 * torch.randn(samples, 4, generator=generator) + 0.5 * shared + own).relu(), targets


def score(features, targets):
    return metrics.mutual_information_score(metrics.mutual_information(features, targets))


@pytest.mark.parametrize("counts", [(10, 20), (7, 5, 2), (1, 9)])
def test_a_half_takes_half_of_every_class_and_no_image_twice(counts):
    targets = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    generator, odd = torch.Generator().manual_seed(0), set()
    targets = targets[torch.randperm(len(targets), generator=generator)]
    for _ in range(20):
        half = random_half(targets, generator)
        assert len(half.unique()) == len(half)
        for index, count in enumerate(counts):
            taken = int((targets[half] == index).sum())
            assert taken in (count // 2, (count + 1) // 2)
            odd |= {taken - count // 2} if count % 2 else set()
    assert odd in ({0, 1}, set())


def test_every_image_is_drawn_equally_often():
    generator, drawn = torch.Generator().manual_seed(0), torch.zeros(9)
    for _ in range(2000):
        drawn[random_half(torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]), generator)] += 1
    torch.testing.assert_close(drawn / 2000, torch.full((9,), 0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("samples", [400, 401])
def test_standard_error_of_a_mean_is_the_textbook_one(samples):
    values = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0])
    targets = torch.zeros(samples, dtype=torch.long)
    interval = metrics.half_sample_interval(lambda images: values[images].mean(0), targets, resamples=1000)
    torch.testing.assert_close(interval.estimate, values.mean(0).double())
    torch.testing.assert_close(interval.standard_error, (values.std(0) / samples**0.5).double(), rtol=0.07, atol=0)
    torch.testing.assert_close(interval.high - interval.low, 2 * 1.959964 * interval.standard_error)


def test_spread_between_classes_does_not_count_because_their_shares_are_fixed():
    targets = torch.arange(100) % 2
    interval = metrics.half_sample_interval(lambda images: targets[images].double().mean(), targets, resamples=5)
    assert interval.standard_error == 0


def test_standard_error_of_the_score_is_the_spread_over_data_sets_and_a_little_more():
    spread = torch.stack([score(*simulated(90, seed)) for seed in range(50)]).std()
    errors = [metrics.mutual_information_score_interval(*simulated(90, seed), resamples=15) for seed in range(3)]
    ratio = float(torch.stack([interval.standard_error for interval in errors]).mean() / spread)
    assert 0.7 < ratio < 1.7


def test_estimate_is_the_score_of_all_images_and_the_global_random_state_stays():
    features, targets = simulated(60, 0)
    state = torch.random.get_rng_state()
    interval = metrics.mutual_information_score_interval(features, targets, resamples=3, random_state=1)
    again = metrics.mutual_information_score_interval(features, targets, resamples=3, random_state=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert interval == again
    mi = metrics.mutual_information(features, targets, random_state=1)
    assert float(interval.estimate) == float(metrics.mutual_information_score(mi))


@pytest.mark.slow
def test_intervals_hold_the_expected_score_as_often_as_they_say():
    truth = torch.stack([score(*simulated(120, 1000 + seed)) for seed in range(400)]).mean()
    data = (simulated(120, seed) for seed in range(100))
    found = [metrics.mutual_information_score_interval(*pair, resamples=40) for pair in data]
    assert sum(bool(interval.low < truth < interval.high) for interval in found) >= 88


@pytest.mark.slow
def test_drawing_with_replacement_inflates_the_score():
    features, targets = simulated(300, 0)
    drawn = torch.randint(0, 300, (300,), generator=torch.Generator().manual_seed(0))
    assert score(features[drawn], targets[drawn]) > 1.4 * score(features, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 1}, "at least 2, but is 1"),
        ({"confidence": 95}, "pass 0.95"),
        ({"targets": torch.arange(3)}, "at least 4 images"),
    ],
)
def test_wrong_options_are_refused(options, message):
    options = {"targets": torch.zeros(10, dtype=torch.long), **options}
    with pytest.raises(ValueError, match=message):
        metrics.half_sample_interval(lambda images: math.pi, **options)
