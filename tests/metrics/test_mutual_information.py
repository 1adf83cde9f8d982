import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.mutual_information import mutual_information as reference
from sklearn.preprocessing import scale

from timm_csg.metrics.information import (
    _scaled_with_noise,
    mutual_information,
    mutual_information_bound,
    mutual_information_per_class,
    mutual_information_per_filter,
    mutual_information_score,
)

KINDS = ("normal", "relu", "informative", "duplicated", "rounded", "zeros", "constant", "large constant", "outlier")


def features_of(kind, samples, filters, targets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, filters, generator=generator)
    own = (targets[:, None] == torch.arange(filters) % (int(targets.max()) + 1)).float()
    return {
        "normal": noise,
        "relu": (noise - 0.5).relu(),
        "informative": (noise + 4 * own).double(),
        "duplicated": noise[torch.randint(0, max(1, samples // 4), (samples,), generator=generator)],
        "rounded": (3 * noise).round(),
        "zeros": torch.zeros(samples, filters),
        "constant": torch.full((samples, filters), 7.3),
        "large constant": torch.full((samples, filters), 7.3e5, dtype=torch.float64),
        "outlier": noise.relu() + 1e6 * (torch.arange(samples)[:, None] == 0),
    }[kind]


def random_targets(samples, num_classes, seed=0):
    return torch.randint(0, num_classes, (samples,), generator=torch.Generator().manual_seed(seed))


def largest_difference(features, targets, num_classes, neighbors=3, random_state=0, **options):
    options = {"neighbors": neighbors, "random_state": random_state, **options}
    ours = mutual_information(features, targets, num_classes, **options)
    assert ours.shape == (num_classes, features.shape[1])
    return np.abs(ours.numpy() - reference(features, targets, num_classes, neighbors, random_state)).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "num_classes"), [(400, 4), (150, 30)])
def test_equals_scikit_learn(kind, samples, num_classes):
    targets = random_targets(samples, num_classes)
    assert largest_difference(features_of(kind, samples, 5, targets), targets, num_classes) < 1e-12


@pytest.mark.parametrize("members", [0, 1, 2, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("kind", ["relu", "constant"])
def test_equals_scikit_learn_for_a_small_class_and_its_mirror_image(members, kind):
    targets = (torch.arange(80) < members).long()
    features = features_of(kind, 80, 3, targets)
    assert largest_difference(features, targets, 3) < 1e-12
    assert largest_difference(features, 1 - targets, 3) < 1e-12


@pytest.mark.parametrize("samples", [3, 4, 5, 8, 9, 15, 16, 17])
def test_equals_scikit_learn_for_few_samples(samples):
    for num_classes in (1, 2, 3, samples):
        targets = torch.arange(samples) % num_classes
        for kind in ("normal", "constant"):
            assert largest_difference(features_of(kind, samples, 4, targets), targets, num_classes + 1) < 1e-12


@pytest.mark.parametrize("neighbors", [1, 2, 5, 10])
@pytest.mark.parametrize("kind", ["relu", "rounded"])
def test_equals_scikit_learn_for_other_numbers_of_neighbors(neighbors, kind):
    targets = random_targets(200, 12)
    assert largest_difference(features_of(kind, 200, 3, targets), targets, 12, neighbors) < 1e-12


def test_equals_scikit_learn_when_classes_do_not_overlap():
    targets = torch.arange(400) // 100
    features = 10.0 * targets[:, None] + features_of("normal", 400, 3, targets)
    assert largest_difference(features, targets, 4) < 1e-12


def test_exactly_equal_values_are_counted_as_a_tree_counts_them(monkeypatch):
    module = sys.modules["timm_csg.metrics.information"]
    monkeypatch.setattr(module, "_scaled_with_noise", lambda features, *_: features.T.double().contiguous())
    values = torch.tensor([0.0] * 10 + [100, -100, 101, -101, 103, -103, 107, -107, 115, -115])
    targets = torch.tensor([0, 1] * 10)
    ours = mutual_information(values[:, None], targets)[:, 0]
    counts = []
    for index, value in enumerate(values):
        same = (values - value).abs()[(targets == targets[index]) & (torch.arange(20) != index)]
        radius = same.sort().values[2].nextafter(torch.tensor(0.0))
        counts.append(int(((values - value).abs() <= radius).sum()))
    digamma = torch.special.digamma
    expected = digamma(torch.tensor(20.0)) + digamma(torch.tensor(3.0)) - digamma(torch.tensor(10.0))
    expected = (expected - digamma(torch.tensor(counts, dtype=torch.float64)).mean()).clamp_min(0)
    assert expected > 0.01
    assert ours.tolist() == pytest.approx([float(expected)] * 2, abs=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_equals_scikit_learn_for_any_small_input(data):
    samples, num_classes = data.draw(st.integers(3, 40)), data.draw(st.integers(1, 6))
    targets = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=samples, max_size=samples))
    number = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1e6, 1e6, width=32))
    values = data.draw(st.lists(number, min_size=samples, max_size=samples))
    features = torch.tensor(values)[:, None]
    assert largest_difference(features, torch.tensor(targets), num_classes) < 1e-10


@pytest.mark.parametrize("shape", [(3, 1), (1000, 1), (257, 33), (3000, 40)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_scaling_and_noise_are_bit_equal_to_those_of_scikit_learn(shape, order):
    values = np.asarray(np.random.default_rng(0).gamma(1.0, 5.0, shape), order=order)
    mask = np.ones(shape[1], dtype=bool)
    expected = scale(values[:, mask], with_mean=False)
    means = np.maximum(1, np.mean(np.abs(expected), axis=0))
    expected += 1e-10 * means * np.random.RandomState(7).standard_normal(size=shape)
    assert np.array_equal(_scaled_with_noise(torch.from_numpy(values), 7).numpy().T, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype_gives_float64(dtype):
    targets = random_targets(100, 3)
    features = features_of("relu", 100, 2, targets).to(dtype)
    mi = mutual_information(features, targets.int())
    assert mi.dtype == torch.float64
    assert largest_difference(features, targets, 3) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunk_size_does_not_change_the_result(chunk_size):
    targets = random_targets(200, 4)
    features = features_of("relu", 200, 7, targets)
    mi = mutual_information(features, targets, chunk_size=chunk_size)
    assert torch.equal(mi, mutual_information(features, targets))


def test_threads_and_blocks_do_not_change_the_result(monkeypatch):
    targets = random_targets(200, 4)
    features = features_of("relu", 200, 7, targets)
    expected = mutual_information(features, targets)
    assert torch.equal(mutual_information(features, targets, threads=3, chunk_size=2), expected)
    monkeypatch.setattr(sys.modules["timm_csg.metrics.information"], "_VALUES_IN_FLOAT64", 600)
    assert torch.equal(mutual_information(features, targets), expected)


def test_memory_mapped_features_give_the_same_result(tmp_path):
    targets = random_targets(100, 3)
    features = features_of("relu", 100, 5, targets)
    np.save(tmp_path / "features.npy", features.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c"))
    assert torch.equal(mutual_information(mapped, targets), mutual_information(features, targets))


def test_features_stay_as_they_are_and_need_no_gradient():
    targets = random_targets(50, 3)
    features = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    before = features.detach().clone()
    assert not mutual_information(features, targets).requires_grad
    assert torch.equal(features, before)


def test_transposed_features_give_the_same_result():
    targets = random_targets(100, 3)
    features = features_of("relu", 100, 5, targets)
    assert torch.equal(mutual_information(features.T.contiguous().T, targets), mutual_information(features, targets))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_result():
    for kind in KINDS:
        targets = random_targets(2000, 40)
        features = features_of(kind, 2000, 8, targets)
        on_gpu = mutual_information(features.cuda(), targets.cuda())
        assert on_gpu.is_cuda
        assert torch.allclose(on_gpu.cpu(), mutual_information(features, targets), atol=1e-12)


def test_a_class_without_samples_has_no_information():
    targets = random_targets(100, 3)
    assert mutual_information(torch.randn(100, 2), targets, 5)[3:].abs().max() < 1e-12


def test_a_perfect_filter_reaches_the_bound_up_to_one_over_twice_the_samples():
    targets = torch.arange(1000) % 10
    features = (targets == 4).float()[:, None] * 100 + torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
    mi, bound = mutual_information(features, targets)[4], mutual_information_bound(targets)[4]
    assert float(mi - bound) <= 1 / 2000 + 1e-5
    assert float(mi) == pytest.approx(float(bound), rel=0.05)


def test_bound_is_the_entropy_of_one_class_against_the_rest():
    bound = mutual_information_bound(torch.tensor([0, 0, 0, 1]), 3)
    assert bound.tolist() == pytest.approx([0.5623351446, 0.5623351446, 0.0])
    balanced = mutual_information_bound(torch.arange(50) % 10)
    assert balanced.tolist() == pytest.approx([-0.1 * math.log(0.1) - 0.9 * math.log(0.9)] * 10)


def test_score_is_the_mean_over_filters_of_the_maximum_over_classes():
    assert float(mutual_information_score(torch.tensor([[0.4, 0.0], [0.1, 0.2]]))) == pytest.approx(0.3)


MATRIX = torch.tensor([[0.4, 0.0, 0.3], [0.1, 0.2, 0.0], [0.0, 0.1, 0.0]])


def test_table_per_class_by_hand():
    table = mutual_information_per_class(MATRIX)
    assert table.best.tolist() == pytest.approx([0.4, 0.2, 0.1])
    assert table.best_filter.tolist() == [0, 1, 1]
    assert table.filters.tolist() == [2, 1, 0]
    assert table.mean_of_own.tolist() == pytest.approx([0.35, 0.2, 0.0])
    weighted = (table.mean_of_own * table.filters).sum() / table.filters.sum()
    assert float(weighted) == pytest.approx(float(mutual_information_score(MATRIX)))


def test_table_per_filter_by_hand():
    table = mutual_information_per_filter(MATRIX)
    assert table.best.tolist() == pytest.approx([0.4, 0.2, 0.3])
    assert table.best_class.tolist() == [0, 1, 0]
    assert table.second.tolist() == pytest.approx([0.1, 0.1, 0.0])
    assert table.second_class.tolist()[:2] == [1, 2]
    assert table.selectivity.tolist() == pytest.approx([0.75, 0.5, 1.0])
    assert mutual_information_per_filter(torch.zeros(2, 1)).selectivity.tolist() == [0.0]
    alone = mutual_information_per_filter(MATRIX[:1])
    assert (alone.second.tolist(), alone.second_class.tolist()) == ([0, 0, 0], [0, 0, 0])


def test_a_perfect_filter_of_ten_classes_has_the_selectivity_stated():
    targets = torch.arange(4000) % 10
    features = (targets == 4).float()[:, None] * 100 + torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    table = mutual_information_per_filter(mutual_information(features, targets))
    assert float(table.selectivity) == pytest.approx(0.966, abs=0.03)


def test_scikit_learn_is_not_used(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import now raises ImportError
    assert mutual_information(torch.rand(9, 2), torch.arange(9) % 2).shape == (2, 2)


GOOD = torch.arange(12.0).view(6, 2)
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("features", "targets", "options", "error", "message"),
    [
        (GOOD.numpy(), CLASSES, {}, TypeError, "floating-point tensor .* got ndarray"),
        (GOOD.long(), CLASSES, {}, TypeError, "got torch.int64"),
        (GOOD[:, 0], CLASSES, {}, ValueError, r"\[samples, filters\], but it is \[6\]"),
        (GOOD[:, :0], CLASSES, {}, ValueError, r"it is \[6, 0\]"),
        (GOOD[:2], CLASSES[:2], {}, ValueError, "at least 3 samples, but features has 2"),
        (GOOD.clone().fill_(torch.nan), CLASSES, {}, ValueError, r"12 of 12 values are not \(12 NaN\)"),
        (GOOD.clone().fill_(torch.inf), CLASSES, {}, ValueError, r"\(0 NaN\)"),
        (GOOD.double() * 1e300, CLASSES, {}, ValueError, "overflows float64"),
        (GOOD, CLASSES.float(), {}, TypeError, "integer tensor of class indices, but got torch.float32"),
        (GOOD, CLASSES > 0, {}, TypeError, "got torch.bool"),
        (GOOD, CLASSES.tolist(), {}, TypeError, "got list"),
        (GOOD, CLASSES[:, None], {}, ValueError, "argmax"),
        (GOOD, CLASSES[:5], {}, ValueError, "6 rows and targets has 5"),
        (GOOD, CLASSES - 1, {}, ValueError, "from -1 to 1"),
        (GOOD, CLASSES, {"num_classes": 2}, ValueError, "pass num_classes=3"),
        (GOOD, CLASSES, {"neighbors": 0}, ValueError, "at least 1, but got 0"),
        (GOOD, CLASSES, {"neighbors": 1.5}, ValueError, "got 1.5"),
        (GOOD, CLASSES, {"chunk_size": 0}, ValueError, "at least 1 filter"),
        (GOOD, CLASSES, {"threads": 0}, ValueError, "threads must be at least 1"),
    ],
)
def test_wrong_input_gets_an_error_that_says_what_to_do(features, targets, options, error, message):
    with pytest.raises(error, match=message):
        mutual_information(features, targets, **options)


@pytest.mark.parametrize("mi", [torch.zeros(3), torch.zeros(0, 4)])
@pytest.mark.parametrize(
    "summary", [mutual_information_score, mutual_information_per_class, mutual_information_per_filter]
)
def test_a_summary_of_something_else_than_a_matrix_is_refused(mi, summary):
    with pytest.raises(ValueError, match=r"\[classes, filters\]"):
        summary(mi)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "filters", "num_classes", "checked"), [(10000, 64, 10, (0, 4, 9)), (5000, 512, 100, (37,))]
)
@pytest.mark.parametrize("kind", ["normal", "relu", "duplicated"])
def test_equals_scikit_learn_at_full_size(kind, samples, filters, num_classes, checked):
    targets = random_targets(samples, num_classes)
    features = features_of(kind, samples, filters, targets)
    mi = mutual_information(features, targets)
    for index in checked:
        expected = reference(features, (targets == index).long(), 2)[1]
        assert np.abs(mi[index].numpy() - expected).max() < 1e-6
