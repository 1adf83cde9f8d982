"""Intervals of shares against SciPy; sensitivity and specificity against scikit-learn."""

import math

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import recall_score

from timm_csg import metrics


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("hits", "total"), [(0, 1), (1, 1), (0, 36), (35, 36), (36, 36), (18, 36), (700, 800)])
def test_interval_is_scipys(hits, total, confidence):
    found = metrics.wilson_interval(hits, total, confidence=confidence)
    expected = binomtest(hits, total).proportion_ci(confidence, method="wilson")
    assert found.share == hits / total
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_by_hand():
    # n = 10, p = 0.8, z = 1.959964: (0.8 + 0.192073) ± 1.959964 √(0.016 + 0.0096037), divided by 1.384146
    found = metrics.wilson_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert str(found) == "0.800 (0.490 to 0.943)"


def test_no_images_leave_everything_open():
    found = metrics.wilson_interval(0, 0)
    assert math.isnan(found.share)
    assert found[1:] == (0.0, 1.0)


@pytest.mark.parametrize(("hits", "total", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (0.5, 2, 0.95), (1, 2, 1.0)])
def test_impossible_numbers_are_refused(hits, total, confidence):
    with pytest.raises(ValueError, match="must be"):
        metrics.wilson_interval(hits, total, confidence=confidence)


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 3, generator=generator), torch.randint(0, 3, (60,), generator=generator)


def test_accuracy_has_the_interval_of_its_hits(answers):
    logits, targets = answers
    hits = int((logits.argmax(1) == targets).sum())
    assert metrics.accuracy_interval(logits, targets) == metrics.wilson_interval(hits, 60)
    assert metrics.accuracy_interval(logits, targets).share == metrics.accuracy(logits, targets)


def test_rates_are_scikit_learns_recall_of_a_class_and_of_the_rest(answers):
    logits, targets = answers
    found, predicted = metrics.class_rates(logits, targets, 3), logits.argmax(1)
    for label in range(3):
        sensitivity = recall_score(targets == label, predicted == label)
        specificity = recall_score(targets != label, predicted != label)
        assert found.sensitivity[label] == pytest.approx(sensitivity)
        assert found.specificity[label] == pytest.approx(specificity)
        count = int((targets == label).sum())
        interval = metrics.wilson_interval(round(sensitivity * count), count)
        assert found.sensitivity_interval[label].tolist() == pytest.approx(list(interval[1:]))
        interval = metrics.wilson_interval(round(specificity * (60 - count)), 60 - count)
        assert found.specificity_interval[label].tolist() == pytest.approx(list(interval[1:]))


def test_two_classes_exchange_their_rates(answers):
    logits, targets = answers[0][:, :2], answers[1] % 2
    found = metrics.class_rates(logits, targets, 2)
    assert torch.equal(found.sensitivity, found.specificity.flip(0))


def test_classes_without_images_have_no_sensitivity():
    found = metrics.class_rates(torch.tensor([[1.0, 0.0, 0.0]] * 3), torch.zeros(3, dtype=torch.long), 3)
    assert found.sensitivity[0] == 1
    assert found.sensitivity[1:].isnan().all()
    assert found.specificity.isnan().tolist() == [True, False, False]
