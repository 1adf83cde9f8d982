"""Which filters belong to which class: correlations and assignments against slow oracles; the pass over pictures."""

import itertools
import math
import time

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_in_processes
from reference import assigned as reference
from sklearn.feature_selection import r_regression
from torch import nn

import timm_csg
from timm_csg import assign_filters
from timm_csg.assignment import ResponseSums, assign, correlation, features_of, no_sums

KINDS = ["indices", "soft", "multi-hot"]


def random_batch(kind, pictures=30, num_filters=6, num_classes=4, seed=0):
    """Responses, targets, and the targets as rows of numbers."""
    generator = torch.Generator().manual_seed(seed)
    responses = torch.randn(pictures, num_filters, generator=generator)
    rows = torch.rand(pictures, num_classes, generator=generator)
    if kind == "indices":
        targets = rows.argmax(dim=1)
        return responses, targets, nn.functional.one_hot(targets, num_classes)
    if kind == "soft":
        rows = (4 * rows).softmax(dim=1)
        return responses, rows, rows
    rows = (rows < 0.4).long()
    return responses, rows, rows


def total(correlations, matrix):
    return float(correlations[matrix].sum())


# Sums and correlations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 30])
def test_sums_over_batches_equal_those_of_one_pass(kind, size):
    responses, targets, _ = random_batch(kind)
    whole = ResponseSums.of(responses, targets, 4)
    parts = [ResponseSums.of(*part, 4) for part in zip(responses.split(size), targets.split(size), strict=True)]
    found = parts[0]
    for part in parts[1:]:
        found = found.plus(part)
    for mine, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(mine, expected)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), st.integers(2, 20), st.integers(0, 1000))
def test_correlation_is_numpys(kind, pictures, seed):
    responses, targets, rows = random_batch(kind, pictures, seed=seed)
    found = correlation(ResponseSums.of(responses, targets, 4))
    np.testing.assert_allclose(found.numpy(), reference.correlation(responses.numpy(), rows.numpy()), atol=1e-9)


def test_correlation_is_scikit_learns():
    responses, targets, rows = random_batch("indices", pictures=200)
    found = correlation(ResponseSums.of(responses, targets, 4))
    for c in range(4):
        np.testing.assert_allclose(found[c].numpy(), r_regression(responses.double().numpy(), rows[:, c]), atol=1e-9)


def test_correlation_survives_a_large_offset():
    responses, targets, rows = random_batch("indices", pictures=200)
    shifted = responses.double() + 1000
    found = correlation(ResponseSums.of(shifted, targets, 4))
    np.testing.assert_allclose(found.numpy(), reference.correlation(shifted.numpy(), rows.numpy()), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-20, -3e8])
def test_constant_filters_and_classes_correlate_with_nothing(value):
    responses, _, _ = random_batch("indices")
    responses[:, 2] = value
    found = correlation(ResponseSums.of(responses, torch.zeros(30, dtype=torch.long), 4))
    assert not found.any()
    found = correlation(ResponseSums.of(responses, torch.arange(30) % 4, 4))
    assert not found[:, 2].any()
    assert found[:, [0, 1, 3, 4, 5]].all()


# Assignment


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 6), st.data())
def test_assignment_is_the_best_of_all(num_classes, num_filters, data):
    values = st.lists(st.floats(-1, 1), min_size=num_filters, max_size=num_filters)
    correlations = torch.tensor(data.draw(st.lists(values, min_size=num_classes, max_size=num_classes)))
    possible = num_filters // num_classes
    if not possible:
        return
    per_class = data.draw(st.none() | st.integers(1, possible))
    found = assign(correlations, per_class)
    expected = reference.best_total(correlations.double().tolist(), per_class)
    assert total(correlations.double(), found) == pytest.approx(expected, abs=1e-6)
    assert (found.sum(dim=0) <= 1).all()
    counts = found.sum(dim=1)
    if per_class is None:
        assert found.any(dim=0).all()
        assert counts.max() - counts.min() <= 1
    else:
        assert (counts == per_class).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 1000), st.data())
def test_shared_filters_have_as_few_classes_as_possible(num_classes, num_filters, seed, data):
    per_class = data.draw(st.integers(1, num_filters))
    if per_class * num_classes <= num_filters:
        return
    correlations = torch.rand(num_classes, num_filters, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found = assign(correlations, per_class)
    assert (found.sum(dim=1) == per_class).all()
    assert found.sum(dim=0).max() == math.ceil(per_class * num_classes / num_filters)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 1000))
def test_one_shared_filter_a_class_is_the_best_choice(num_classes, num_filters, seed):
    if num_classes <= num_filters:
        return
    correlations = torch.rand(num_classes, num_filters, generator=torch.Generator().manual_seed(seed)).double()
    most = math.ceil(num_classes / num_filters)
    tried = (
        sum(float(correlations[c, k]) for c, k in enumerate(filters))
        for filters in itertools.product(range(num_filters), repeat=num_classes)
        if max(map(filters.count, filters)) <= most
    )
    assert total(correlations, assign(correlations, 1)) == pytest.approx(max(tried))


def test_fewer_filters_than_classes_give_each_class_three_and_a_code_of_its_own():
    correlations = torch.rand(100, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = assign(correlations)
    assert (found.sum(dim=1) == 3).all()
    assert found.sum(dim=0).max() == 5  # 300 places for 64 filters
    assert len({tuple(row) for row in found.tolist()}) == 100


def test_pairs_of_filters_tell_apart_nearly_all_classes_that_are_alike():
    kinds = torch.rand(10, 64, generator=torch.Generator().manual_seed(0)).repeat(10, 1)  # ten classes of each kind
    found = assign(kinds + 1e-3 * torch.rand(100, 64, generator=torch.Generator().manual_seed(1))).float()
    common = (found @ found.T).fill_diagonal_(0)
    assert (common >= 2).float().mean() < 0.01  # 0.09 where classes take the filters that they like best


def test_many_classes_are_assigned_in_parts_as_well_spread(monkeypatch):
    correlations = torch.rand(100, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = assign(correlations)
    monkeypatch.setattr("timm_csg.assignment.CLASSES_AT_A_TIME", 30)
    found = assign(correlations)
    assert (found.sum(dim=1) == 3).all()
    assert found.sum(dim=0).max() == 5
    assert correlations[whole].mean() > correlations[found].mean() > 0.9 * correlations[whole].mean()


def test_sums_of_as_many_classes_as_a_face_data_set_has_fit_in_memory():
    sums = ResponseSums.of(torch.ones(2, 8), torch.tensor([0, 85_741]), 85_742)
    assert sums.product.sum(dim=1).nonzero()[:, 0].tolist() == [0, 85_741]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_correlations_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="correlations must be finite; look for NaN"):
        assign(torch.tensor([[0.5, value]]))


@pytest.mark.parametrize("count", [0, 4])
def test_impossible_number_of_filters_a_class_is_refused(count):
    with pytest.raises(ValueError, match=f"between 1 and 3 filters, but is {count}"):
        assign(torch.rand(2, 3), count)


def test_equal_correlations_still_give_every_class_its_share():
    assert assign(torch.zeros(3, 7)).sum(dim=1).sort().values.tolist() == [2, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("num_filters", [2048, 512])
def test_a_thousand_classes_are_assigned_in_seconds(num_filters):
    correlations = torch.rand(1000, num_filters, generator=torch.Generator().manual_seed(0)) * 2 - 1
    start = time.perf_counter()
    found = assign(correlations)
    assert time.perf_counter() - start < 30
    assert found.any(dim=1).all()


# The pass over pictures


def coloured(count=40, num_classes=5, seed=3):
    """Noise with a stripe whose place tells the class."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.rand(count, 3, 64, 64, generator=generator), torch.arange(count) % num_classes
    for image, target in zip(images, targets, strict=True):
        image[:, 8 * target : 8 * target + 8] += 2
    return images, targets


def batches(images, targets, size=8):
    return list(zip(images.split(size), targets.split(size), strict=True))


def test_assignment_of_a_model_is_that_of_its_responses(any_model):
    model, (images, targets) = timm_csg.differentiate(any_model), coloured()
    found = assign_filters(model, batches(images, targets))
    with torch.no_grad():
        responses = model.mechanism.responses(model.forward_features(images), model.read_head())
    rows = nn.functional.one_hot(targets, 5)
    expected = reference.correlation(responses.double().numpy(), rows.numpy())
    np.testing.assert_allclose(found.correlations.numpy(), expected, atol=1e-4)
    assert torch.equal(found.matrix, assign(found.correlations))
    assert torch.equal(model.mechanism.assignment, found.matrix)
    torch.testing.assert_close(model.mechanism.mean, responses.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.mechanism.variance, responses.var(dim=0, correction=0), rtol=1e-3, atol=1e-6)
    assert not model.mechanism.is_blind


@pytest.mark.parametrize("size", [1, 7, 40])
def test_batches_make_no_difference(make_model, size):
    whole, parts = (timm_csg.differentiate(make_model()) for _ in range(2))
    images, targets = coloured()
    expected = assign_filters(whole, batches(images, targets, 40))
    found = assign_filters(parts, batches(images, targets, size))
    torch.testing.assert_close(found.correlations, expected.correlations, rtol=0, atol=1e-4)
    assert total(expected.correlations, found.matrix) == pytest.approx(total(expected.correlations, expected.matrix))
    torch.testing.assert_close(parts.mechanism.variance, whole.mechanism.variance, rtol=1e-4, atol=1e-7)


def test_modes_weights_and_gradients_are_left_as_found(make_model):
    model = timm_csg.differentiate(make_model()).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assign_filters(model, batches(*coloured()))
    assert [module.training for module in model.modules()] == modes
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    own = {"mechanism.owned", "mechanism.mean", "mechanism.variance", "mechanism.assigned_from_data"}
    assert changed == {*own, "fc.weight", "fc.bias"}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "restarts"), [({}, True), ({"mask_classifier": False}, False)], ids=["masked", "dense"]
)
def test_classifier_that_is_masked_starts_again_from_0(make_model, options, restarts):
    model = timm_csg.differentiate(make_model(), **options)
    assign_filters(model, batches(*coloured()))
    assert (not model.fc.weight.any()) is restarts
    assert (not model.fc.bias.any()) is restarts


@pytest.mark.parametrize("kind", ["soft", "multi-hot", "one-hot"])
def test_rows_as_targets_are_understood(make_model, kind):
    images, targets = coloured()
    rows = nn.functional.one_hot(targets, 5)
    if kind == "soft":
        rows = 0.9 * rows + 0.02
    elif kind == "multi-hot":
        rows[::3, 0] = 1
    model = timm_csg.differentiate(make_model())
    found = assign_filters(model, batches(images, rows))
    with torch.no_grad():
        responses = model.mechanism.responses(model.forward_features(images), model.read_head())
    expected = reference.correlation(responses.double().numpy(), rows.numpy())
    np.testing.assert_allclose(found.correlations.numpy(), expected, atol=1e-4)


def test_one_picture_of_each_class_is_enough(make_model):
    found = assign_filters(timm_csg.differentiate(make_model()), batches(*coloured(5)))
    assert found.matrix.sum(dim=1).sort().values.tolist() == [19, 19, 19, 19, 20]


def test_rare_classes_get_as_many_filters_as_frequent_ones(make_model):
    images, targets = coloured()
    targets = torch.where(targets < 4, 0, 4)
    targets[:3] = torch.tensor([1, 2, 3])
    found = assign_filters(timm_csg.differentiate(make_model()), batches(images, targets))
    assert found.matrix.sum(dim=1).sort().values.tolist() == [19, 19, 19, 19, 20]


def test_named_number_of_filters_leaves_the_others_unowned_and_unused(make_model):
    model = timm_csg.differentiate(make_model(), filters_per_class=3)
    found = assign_filters(model, batches(*coloured()))
    assert found.matrix.sum(dim=1).tolist() == [3] * 5
    assert "81 unowned" in repr(found)
    with torch.no_grad():
        model.fc.weight.fill_(1)
    model.project_()
    assert int(model.fc.weight.count_nonzero()) == 15


def test_constant_filters_are_handed_out_with_a_log_line(make_model, caplog):
    model = timm_csg.differentiate(make_model())
    with torch.no_grad():  # the last norms' outputs: two filters that say nothing
        model.layer4[-1].bn2.weight[[3, 70]] = 0
        model.layer4[-1].bn2.bias[[3, 70]] = -1e6
    with torch.no_grad():
        responses = model.mechanism.responses(model.forward_features(coloured()[0]), model.read_head())
    constant = int((responses == responses[0]).all(dim=0).sum())
    with caplog.at_level("INFO", logger="timm_csg"):
        found = assign_filters(model, batches(*coloured()))
    assert 2 <= constant < 96
    assert f"{constant} filters respond to all pictures alike" in caplog.text
    assert found.matrix.any(dim=0).all()
    assert not found.correlations[:, [3, 70]].any()


def test_class_without_pictures_is_named(make_model):
    images, targets = coloured(num_classes=3)
    model = timm_csg.differentiate(make_model())
    with pytest.raises(ValueError, match=r"2 of 5 have none \(3, 4\); give pictures of these"):
        assign_filters(model, batches(images, targets))
    assert model.mechanism.is_blind
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["ant", "bee", "cat", "dog", "eel"]}
    with pytest.raises(ValueError, match=r"2 of 5 have none \(dog, eel\)"):
        assign_filters(model, batches(images, targets))


def test_responses_that_are_not_finite_are_named_and_nothing_is_assigned(make_model):
    model = timm_csg.differentiate(make_model())
    with torch.no_grad():
        model.layer4[-1].bn2.bias[7] = torch.nan
    with pytest.raises(ValueError, match=r"responses of 1 filters \(the first: \[7\]\) are not finite"):
        assign_filters(model, batches(*coloured()))
    assert model.mechanism.is_blind


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"image": torch.rand(2, 3, 64, 64), "label": torch.arange(2)}, "but yields dict; for dictionaries pass"),
        (torch.rand(2, 3, 64, 64), "but yields Tensor;"),
        ((torch.rand(2, 3, 64, 64), ["a", "b"]), "but yields Tensor and list;"),
        (
            (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.arange(2)),
            r"normalised as in training, .* torch\.uint8",
        ),
    ],
)
def test_batches_of_other_kinds_are_refused_by_all_that_read_a_loader(make_model, batch, words):
    model = timm_csg.differentiate(make_model())
    uses = [
        lambda: assign_filters(model, [batch]),
        lambda: timm_csg.adapt(model, [batch]),
        lambda: timm_csg.measuring.collect(model, [batch]),
        lambda: timm_csg.measuring.ablate(model, [batch], torch.arange(96) % 5, 5),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=words):
            use()


def test_empty_loader_is_refused(make_model):
    with pytest.raises(ValueError, match="the loader yields no images"):
        assign_filters(timm_csg.differentiate(make_model()), [])


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [(None, "expected a differentiated model, but found ResNet"), ("csg", "its mechanism is 'csg'")],
)
def test_model_without_assigned_filters_is_refused_with_the_remedy(make_model, mechanism, words):
    model = make_model()
    if mechanism:
        timm_csg.differentiate(model, mechanism=mechanism)
    with pytest.raises(TypeError, match=words):
        assign_filters(model, batches(*coloured()))


def test_progress_is_told_after_every_batch(make_model):
    seen = []
    assign_filters(timm_csg.differentiate(make_model()), batches(*coloured(), size=16), progress=seen.append)
    assert seen == [16, 16, 8]


def test_autocast_and_low_precision_find_nearly_the_same(make_model):
    exact = assign_filters(timm_csg.differentiate(make_model()), batches(*coloured()))
    mixed = assign_filters(timm_csg.differentiate(make_model()), batches(*coloured()), amp_dtype=torch.bfloat16)
    model = timm_csg.differentiate(make_model().bfloat16())
    images, targets = coloured()
    low = assign_filters(model, batches(images.bfloat16(), targets))
    assert model.mechanism.mean.dtype == torch.bfloat16
    for found in (mixed, low):
        assert (found.correlations - exact.correlations).abs().median() < 0.05
        assert found.matrix.any(dim=1).all()


def test_wrapped_and_compiled_models_are_looked_through(make_model):
    model = timm_csg.differentiate(make_model())
    expected = assign_filters(model, batches(*coloured())).matrix
    again = timm_csg.differentiate(make_model())
    assert torch.equal(assign_filters(torch.compile(again, backend="eager"), batches(*coloured())).matrix, expected)


def test_member_of_a_chain_is_found_and_sees_masked_features(make_model):
    model = timm_csg.differentiate(make_model(), mechanism=["icnn", "assigned"])
    icnn, own = model.mechanism.members
    images, targets = coloured()
    found = assign_filters(model, batches(images, targets))
    with torch.no_grad():
        responses = own.responses(icnn(model.forward_features(images)), model.read_head())
    expected = reference.correlation(responses.double().numpy(), nn.functional.one_hot(targets, 5).numpy())
    np.testing.assert_allclose(found.correlations.numpy(), expected, atol=1e-4)
    assert torch.equal(own.assignment, found.matrix)


def test_no_sums_add_nothing(make_model):
    mechanism = timm_csg.differentiate(make_model()).mechanism
    responses, targets, _ = random_batch("indices", num_filters=96, num_classes=5)
    sums = ResponseSums.of(responses, targets, 5)
    for mine, expected in zip(no_sums(mechanism).plus(sums), sums, strict=True):
        assert torch.equal(mine, expected)


def test_features_are_those_of_the_head_and_without_gradient(make_model):
    model = timm_csg.differentiate(make_model())
    images, targets = coloured(8)
    ((features, given),) = features_of(model, [(images, targets)])
    assert not features.requires_grad
    assert torch.equal(given, targets)
    with torch.no_grad():
        assert torch.equal(features, model.forward_features(images))


# Several processes


def assign_in_process(rank, count, folder):
    """Assign filters from this process's share of the pictures, which differ in size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.manual_seed(0)
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5))
    images, targets = coloured()
    cut = slice(0, 27) if rank == 0 else slice(27, None)
    found = assign_filters(model, batches(images[cut], targets[cut]), distributed=True)
    torch.save((found.matrix, found.correlations, model.mechanism.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_several_processes_find_what_one_finds(tmp_path):
    run_in_processes(assign_in_process, 2, str(tmp_path), count=2)
    torch.manual_seed(0)
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5))
    expected = assign_filters(model, batches(*coloured()))
    (first, correlations, state), (second, *_) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert total(expected.correlations, first) == pytest.approx(total(expected.correlations, expected.matrix))
    torch.testing.assert_close(correlations, expected.correlations)
    for name in ("mean", "variance"):
        torch.testing.assert_close(state[name], model.mechanism.state_dict()[name])
