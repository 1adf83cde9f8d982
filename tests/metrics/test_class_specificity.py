"""purity, class_selectivity and class_correlation against loops, and at their edges."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import class_specificity as reference

from timm_csg import metrics

MODULE = sys.modules["timm_csg.metrics.class_specificity"]
ALL_MEASURES = [metrics.purity, metrics.class_selectivity, metrics.class_correlation]


def responses(samples, filters, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, num_classes, (samples,), generator=generator)
    own = targets[:, None] == torch.arange(filters) % num_classes
    return (torch.randn(samples, filters, generator=generator) + own).relu(), targets


@pytest.mark.parametrize(("samples", "num_classes", "count"), [(14, 3, 5), (12, 5, 12), (10, 1, 1)])
def test_purity_equals_the_mean_over_all_choices_among_equal_responses(samples, num_classes, count):
    features, targets = responses(samples, 8, num_classes)
    assert (features == 0).any()
    expected = reference.purity(features, targets, count)
    np.testing.assert_allclose(metrics.purity(features, targets, num_classes, count=count), expected, atol=1e-12)


def test_purity_does_not_depend_on_the_order_of_the_samples():
    features, targets = responses(200, 6, 4)
    features[:, 0] = 0
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    by_class = targets.argsort(stable=True)
    found = [metrics.purity(features[rows], targets[rows]) for rows in (order, by_class)]
    torch.testing.assert_close(found[0], found[1])
    assert float(found[1][0]) == pytest.approx(float(torch.bincount(targets).max()) / 200)


def test_a_filter_of_one_class_is_pure_and_a_class_of_few_samples_cannot_fill_the_places():
    targets = torch.tensor([0] * 30 + [1] * 5 + [2] * 30)
    features = torch.nn.functional.one_hot(targets).float() + 0.01 * torch.arange(65)[:, None] / 65
    assert metrics.purity(features, targets).tolist() == pytest.approx([1, 15 / 20, 1])


@pytest.mark.parametrize("count", [0, 11, True, -1])
def test_purity_refuses_more_places_than_samples(count):
    features, targets = responses(10, 2, 2)
    with pytest.raises(ValueError, match="between 1 and the number of samples, 10"):
        metrics.purity(features, targets, count=count)


@pytest.mark.parametrize(("samples", "num_classes"), [(100, 4), (30, 12), (20, 1)])
def test_selectivity_equals_a_loop(samples, num_classes):
    features, targets = responses(samples, 9, num_classes)
    expected = reference.class_selectivity(features, targets)
    np.testing.assert_allclose(metrics.class_selectivity(features, targets, num_classes + 2), expected, atol=1e-12)


def test_selectivity_is_one_for_one_class_zero_for_all_alike_and_zero_for_silence():
    targets = torch.tensor([0, 0, 1, 2])
    features = torch.tensor([[0.0, 0.7, 0.0], [0.0, 0.7, 0.0], [3.0, 0.7, 0.0], [0.0, 0.7, 0.0]])
    assert metrics.class_selectivity(features, targets, 5).tolist() == [1, 0, 0]


def test_selectivity_refuses_signed_responses_and_names_what_takes_them():
    with pytest.raises(ValueError, match=r"smallest is -1.*class_correlation"):
        metrics.class_selectivity(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize(("samples", "num_classes"), [(100, 4), (30, 12), (2, 2)])
def test_correlation_equals_numpy(samples, num_classes):
    features, targets = responses(samples, 9, num_classes)
    features = features - 0.3
    features[:, 4] = 7.3
    expected = reference.class_correlation(features, targets, num_classes + 1)
    found = metrics.class_correlation(features, targets, num_classes + 1)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not found[:, 4].any()
    assert not found[num_classes].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_correlation_equals_numpy_for_any_small_input(data):
    samples, num_classes = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    targets = torch.tensor(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=samples, max_size=samples)))
    values = st.sampled_from([0.0, 1.0, -3.0, 2.5, 1e5])
    features = torch.tensor(data.draw(st.lists(values, min_size=samples, max_size=samples)))[:, None]
    expected = reference.class_correlation(features, targets, num_classes)
    np.testing.assert_allclose(metrics.class_correlation(features, targets, num_classes), expected, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e300])
def test_correlation_does_not_depend_on_the_scale(scale):
    features, targets = responses(50, 4, 3)
    expected = metrics.class_correlation(features, targets)
    torch.testing.assert_close(metrics.class_correlation(features.double() * scale, targets), expected)


def test_correlation_shows_a_filter_that_tells_by_silence():
    targets = torch.arange(90) % 3
    features = torch.stack([targets == 0, targets != 0], dim=1).float()
    found = metrics.class_correlation(features, targets)
    assert found[0].tolist() == pytest.approx([1, -1])
    information = metrics.mutual_information(features, targets)
    assert information[:, 0].tolist() == pytest.approx(information[:, 1].tolist(), abs=0.02)


def test_correlation_with_two_classes_has_two_signs():
    features, targets = responses(50, 4, 2)
    found = metrics.class_correlation(features, targets)
    torch.testing.assert_close(found[0], -found[1])


@pytest.mark.parametrize("measure", ALL_MEASURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_and_chunk_gives_the_same_in_float64(measure, dtype, monkeypatch):
    features, targets = responses(40, 7, 3)
    features = features.to(dtype).requires_grad_()
    expected = measure(features.detach().float(), targets)
    monkeypatch.setattr(MODULE, "_VALUES_PER_CHUNK", 80)
    found = measure(features, targets.int())
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("measure", ALL_MEASURES)
def test_wrong_arguments_are_named(measure):
    features, targets = responses(30, 2, 3)
    with pytest.raises(ValueError, match="finite"):
        measure(features / 0, targets)
    with pytest.raises(ValueError, match="one row per sample"):
        measure(features, targets[:-1])
    with pytest.raises(ValueError, match="num_classes=3"):
        measure(features, targets, 2)
    with pytest.raises(TypeError, match="class indices"):
        measure(features, targets.float())
    with pytest.raises(TypeError, match="floating-point"):
        measure(features.long(), targets)
