"""Assigned filters: losses, logits, statistics and mask against slow loops; and what holds for any assignment."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assigned as reference
from torch import nn

import timm_csg
from timm_csg import AssignedConfig, AssignedFilters
from timm_csg.mechanisms.assigned import mask_classifier_
from timm_csg.mechanisms.base import Head
from timm_csg.mechanisms.blind import blind_assignment
from timm_csg.mechanisms.solo import draw_table, solo_loss

BOTH = ("standard", "gated")


@st.composite
def assignments(draw, most_classes=5, most_filters=8):
    """Bool [classes, filters] in which every class owns a filter; filters may be shared or unowned."""
    num_classes, num_filters = draw(st.integers(1, most_classes)), draw(st.integers(1, most_filters))
    row = st.lists(st.booleans(), min_size=num_filters, max_size=num_filters).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=num_classes, max_size=num_classes)))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_targets(kind, batch, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "indices":
        return torch.randint(num_classes, (batch,), generator=generator)
    if kind == "soft":
        return torch.rand(batch, num_classes, generator=generator, dtype=torch.float64).add(0.01).softmax(dim=1)
    return (torch.rand(batch, num_classes, generator=generator) < 0.5).long()


def make(num_filters=6, num_classes=3, **options):
    return AssignedFilters(num_filters, num_classes, AssignedConfig(**options))


def pooled_head(weight=None):
    """A head that the mechanism does not look into."""
    return Head("pooled", lambda features: features, lambda features: features, weight, None)


# Solo loss


@settings(deadline=None)
@given(assignments(), st.sampled_from(["indices", "soft", "multi-hot"]), st.integers(0, 100))
def test_solo_loss_equals_the_loops(assignment, kind, seed):
    num_classes, num_filters = assignment.shape
    evidence, bias = 3 * noise(4, num_filters, seed=seed), noise(num_classes, seed=seed + 1)
    targets = random_targets(kind, 4, num_classes, seed)
    found = solo_loss(evidence, draw_table(assignment), bias, assignment, targets)
    expected = reference.solo(evidence.tolist(), bias.tolist(), assignment.tolist(), targets.tolist())
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(assignments(), st.integers(0, 100))
def test_one_hot_rows_and_indices_cost_the_same_where_no_filter_is_shared(assignment, seed):
    assignment = assignment & (assignment.int().cumsum(0) == 1)
    assignment = assignment[assignment.any(dim=1)]
    num_classes, num_filters = assignment.shape
    evidence, bias = noise(4, num_filters, seed=seed), noise(num_classes, seed=seed + 1)
    targets = random_targets("indices", 4, num_classes, seed)
    rows = nn.functional.one_hot(targets, num_classes)
    losses = [
        float(solo_loss(evidence, draw_table(assignment), bias, assignment, form))
        for form in (targets, rows, rows.double())
    ]
    assert losses == pytest.approx([losses[0]] * 3)


def test_filter_that_serves_the_pictures_class_too_is_no_rival():
    assignment = torch.tensor([[True, False], [True, False], [False, True]])  # classes 0 and 1 share filter 0
    evidence = torch.tensor([[5.0, 1.0]])
    found = solo_loss(evidence, draw_table(assignment), torch.zeros(3), assignment, torch.tensor([1]))
    assert float(found) == pytest.approx(math.log1p(math.exp(1 - 5)))


def test_solo_loss_is_right_in_float16_where_logits_are_large():
    evidence = torch.tensor([[60.0, -60.0]], dtype=torch.float16)
    own = torch.eye(2, dtype=torch.bool)
    for target, expected in ((0, 0.0), (1, 120.0)):
        found = solo_loss(evidence, draw_table(own), torch.zeros(2).half(), own, torch.tensor([target]))
        assert float(found) == pytest.approx(expected)


def test_gradient_of_the_solo_loss_is_correct():
    assignment = torch.tensor([[True, True, False, True], [False, True, True, False], [False, False, False, True]])
    evidence, bias = noise(3, 4).requires_grad_(), noise(3).requires_grad_()
    for kind in ("indices", "soft", "multi-hot"):
        targets = random_targets(kind, 3, 3, seed=1)
        loss = lambda evidence, bias, given=targets: solo_loss(  # noqa: E731
            evidence, draw_table(assignment), bias, assignment, given
        )
        assert torch.autograd.gradcheck(loss, (evidence, bias))


def test_every_owned_filter_and_no_other_gets_a_gradient():
    assignment = torch.tensor([[True, True, False, True, False], [False, False, True, False, False]])
    evidence = noise(6, 5).requires_grad_()
    targets = torch.tensor([0, 1, 0, 1, 0, 1])
    solo_loss(evidence, draw_table(assignment), torch.zeros(2).double(), assignment, targets).backward()
    assert (evidence.grad.abs().sum(dim=0) > 0).tolist() == [True, True, True, True, False]


@given(assignments())
def test_draws_are_those_of_the_loop_and_show_every_owned_filter(assignment):
    found = draw_table(assignment)
    assert found.tolist() == reference.draws(assignment.tolist())
    for filters, row in zip(found.transpose(0, 1), assignment, strict=True):
        assert set(filters.flatten().tolist()) == set(row.nonzero()[:, 0].tolist())


# Blind assignment


@given(st.integers(1, 12), st.integers(1, 30), st.data())
def test_every_class_owns_a_filter_before_any_picture_was_seen(num_classes, num_filters, data):
    per_class = data.draw(st.none() | st.integers(1, num_filters))
    found = blind_assignment(num_classes, num_filters, per_class)
    assert found.shape == (num_classes, num_filters)
    assert found.any(dim=1).all()
    if per_class and per_class * num_classes <= num_filters:
        assert (found.sum(dim=1) == per_class).all()
    if (per_class or 1) * num_classes <= num_filters:
        assert (found.sum(dim=0) <= 1).all()


# Statistics and evidence


@settings(deadline=None)
@given(st.sampled_from([(3, 6, 2, 2), (5, 6, 4, 1)]), st.integers(0, 100), st.booleans())
def test_statistics_are_those_of_a_batch_norm(shape, seed, training):
    mechanism = make().train(training)
    norm = nn.BatchNorm1d(6, eps=1e-6, affine=False).train(training)
    for step in range(3):
        features = noise(*shape, seed=seed + step).float()
        targets = torch.arange(len(features)) % 3
        expected = norm(features.mean(dim=(2, 3)))
        assert torch.equal(mechanism.evidence(features, pooled_head()), expected)
        mechanism.losses(features, targets, pooled_head())
        if training:
            assert torch.equal(mechanism.mean, norm.running_mean)
            assert torch.equal(mechanism.variance, norm.running_var)
        else:
            assert not mechanism.mean.any()
            assert mechanism.variance.eq(1).all()


def test_evidence_in_training_is_standardised_over_the_batch():
    features = noise(7, 6, 2, 3)
    mechanism = make().double().train()
    expected = reference.standardised(features.mean(dim=(2, 3)).numpy())
    np.testing.assert_allclose(mechanism.evidence(features, pooled_head()).detach().numpy(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_batch_of_one_picture_uses_the_statistics_kept(make_model, images, gated, training):
    model = gated(timm_csg.differentiate(make_model()))
    features = model.forward_features(images[:1])
    expected = model.mechanism.gated_logits(features, None, model.read_head())
    model.mechanism.train(training)
    before = model.mechanism.mean.clone()
    found = model.mechanism.gated_logits(features, None, model.read_head())
    losses = model.mechanism.losses(features, torch.tensor([2]), model.read_head())
    assert torch.equal(found, expected)
    assert losses["solo"].isfinite()
    assert torch.equal(model.mechanism.mean, before)


def test_responses_are_what_the_head_pools_or_else_the_mean_over_places(any_model, images, gated):
    model = gated(timm_csg.differentiate(any_model))
    features = model.forward_features(images)
    if model.read_head().kind == "linear":
        expected = model.forward_head(features, pre_logits=True)
    elif model.mechanism.channels_last:
        expected = features.mean(dim=(1, 2))
    else:
        expected = features.mean(dim=(2, 3))
    torch.testing.assert_close(model.mechanism.responses(features, model.read_head()), expected)


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_responses_follow_the_models_own_pooling(make_model, images, pool):
    model = timm_csg.differentiate(make_model(global_pool=pool))
    features = model.forward_features(images)
    expected = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.mechanism.responses(features, model.read_head()), expected)


def test_gated_logit_is_the_mean_evidence_of_own_filters_plus_bias(any_model, images, gated):
    model = gated(timm_csg.differentiate(any_model))
    mechanism = model.mechanism
    with torch.no_grad():
        found = model(images, paths=("gated",)).gated
        evidence = mechanism.evidence(model.forward_features(images), model.read_head())
    for image, values in enumerate(evidence):
        for c, own in enumerate(mechanism.assignment):
            expected = values[own].mean() + mechanism.bias[c]
            assert found[image, c].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


# Mask


@given(assignments(), st.integers(0, 100))
def test_masking_keeps_own_weights_to_the_bit_and_is_idempotent(assignment, seed):
    weight = noise(*assignment.shape, seed=seed)
    once = mask_classifier_(weight.clone(), assignment)
    assert torch.equal(once[assignment], weight[assignment])
    assert not once[~assignment].any()
    assert torch.equal(mask_classifier_(once.clone(), assignment), once)


@settings(deadline=None, max_examples=20)
@given(assignments(most_filters=6), st.integers(0, 100))
def test_masked_logits_do_not_depend_on_foreign_filters_to_the_last_bit(assignment, seed):
    num_classes, num_filters = assignment.shape
    weight = mask_classifier_(noise(num_classes, num_filters, seed=seed).float(), assignment)
    pooled, other = noise(2, 3, num_filters, seed=seed + 1).float()
    logits = nn.functional.linear(pooled, weight)
    for c, own in enumerate(assignment):
        changed = nn.functional.linear(torch.where(own, pooled, other), weight)
        assert torch.equal(changed[:, c], logits[:, c])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_standard_logits_of_a_masked_model_ignore_foreign_filters(make_model, images, gated, name):
    model = gated(timm_csg.differentiate(make_model(name)))
    model.project_()
    with torch.no_grad():
        features = model.forward_features(images)
        logits = model.forward_head(features)
        for c, own in enumerate(model.mechanism.assignment):
            rows = torch.where(own, 1.0, torch.rand(own.shape) * 9)[None]
            found = model.forward_head(features * model.mechanism.along_filters(rows, features))
            torch.testing.assert_close(found[:, c], logits[:, c], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_training_ends_every_step_masked(make_model, images, targets, gated, name):
    model = gated(timm_csg.differentiate(make_model(name))).train()
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.AdamW(timm_csg.param_groups(model, lr=0.01, weight_decay=0.05), lr=0.01)
    loop.attach(optimizer, model)
    own = model.mechanism.assignment
    for _ in range(2):
        loop.losses(model, images, targets, nn.functional.cross_entropy)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        weight = model.get_classifier().weight.flatten(1)
        assert not weight[~own].any()
        assert weight[own].any()
        assert (model.mechanism.scale > 0).all()


def test_classifier_stays_dense_where_it_is_not_to_be_masked(make_model, gated):
    model = gated(timm_csg.differentiate(make_model(), mask_classifier=False))
    before = model.fc.weight.clone()
    model.project_()
    assert torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("name", ["test_mambaout", "test_vit"])
def test_head_with_other_layers_between_has_no_mask_and_stays_as_it_is(make_model, gated, name):
    options = {"global_pool": "map"} if name == "test_vit" else {}
    model = gated(timm_csg.differentiate(make_model(name, **options)))
    assert model.head_kind not in ("linear", "normed")
    before = copy.deepcopy(model.head.state_dict())
    model.project_()
    assert all(torch.equal(before[key], value) for key, value in model.head.state_dict().items())


# State


def test_mechanism_takes_over_an_assignment_with_its_draws_and_says_so(random_assignment):
    mechanism, assignment = make(), random_assignment(3, 6)
    assert mechanism.is_blind
    mechanism.assign_(assignment, torch.ones(6), torch.full((6,), 2.0))
    assert not mechanism.is_blind
    assert torch.equal(mechanism.class_filter_matrix().bool(), assignment)
    assert torch.equal(mechanism.draws, draw_table(assignment))
    assert (mechanism.mean.tolist(), mechanism.variance.tolist()) == ([1.0] * 6, [2.0] * 6)


def test_loaded_mechanism_draws_from_the_loaded_assignment(random_assignment):
    source, target = make(), make()
    source.assign_(random_assignment(3, 6, seed=5), torch.zeros(6), torch.ones(6))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.draws, source.draws)
    assert not target.is_blind


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own, mean, variance: (own.float(), mean, variance), r"must be bool \[3, 6\] .* torch.float32 \[3, 6\]"),
        (lambda own, mean, variance: (own[:, :5], mean, variance), r"torch.bool \[3, 5\]"),
        (lambda own, mean, variance: (own & (torch.arange(3) != 1)[:, None], mean, variance), "class 1 owns none"),
        (lambda own, mean, variance: (own, mean * torch.nan, variance), "must be finite"),
        (lambda own, mean, variance: (own, mean, variance / 0), "must be finite"),
    ],
)
def test_wrong_assignment_is_refused_and_changes_nothing(random_assignment, change, words):
    mechanism = make()
    before = copy.deepcopy(mechanism.state_dict())
    with pytest.raises(ValueError, match=words):
        mechanism.assign_(*change(random_assignment(3, 6), torch.ones(6), torch.ones(6)))
    assert all(torch.equal(before[key], value) for key, value in mechanism.state_dict().items())


def test_blind_training_is_warned_about_once(make_model, images, targets, caplog):
    model = timm_csg.differentiate(make_model()).eval()
    model(images, targets, paths=BOTH)
    assert caplog.text == ""
    model.train()
    for _ in range(2):
        model(images, targets, paths=BOTH)
    assert caplog.text.count("assigned to classes blindly; call timm_csg.assign_filters(model, loader)") == 1


def test_training_after_assigning_is_not_warned_about(make_model, images, targets, caplog, gated):
    model = gated(timm_csg.differentiate(make_model())).train()
    model(images, targets, paths=BOTH)
    assert caplog.text == ""


def test_training_goes_on_from_a_checkpoint_without_a_warning(make_model, images, targets, caplog, gated, tmp_path):
    trained = gated(timm_csg.differentiate(make_model()))
    trained.project_()
    model = timm_csg.from_pretrained(timm_csg.save_pretrained(trained, tmp_path))
    assert torch.equal(model.mechanism.draws, draw_table(model.mechanism.assignment))
    model.train()(images, targets, paths=BOTH)
    assert caplog.text == ""


# Config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solo_weight": -1.0}, "solo_weight must be a number, 0 or more, but is -1.0"),
        ({"gated_weight": math.nan}, "gated_weight must be .* nan"),
        ({"filters_per_class": 0}, "filters_per_class must be a number, 1 or more, but is 0"),
        ({"filters_per_class": 2.5}, r"filters_per_class must be a whole number or None, but is 2\.5"),
        ({"filters_per_class": True}, "filters_per_class must be .* True"),
        ({"mask_classifier": 1}, "mask_classifier must be true or false, but is 1"),
    ],
)
def test_config_names_the_wrong_value(options, words):
    with pytest.raises(ValueError, match=words):
        AssignedConfig(**options)


def test_more_filters_a_class_than_there_are_is_refused(tiny_model):
    with pytest.raises(ValueError, match="filters_per_class must be at most the stage's 96 filters, but is 97"):
        timm_csg.differentiate(tiny_model, filters_per_class=97)
    assert not timm_csg.is_differentiated(tiny_model)


def test_defaults_are_those_of_the_recipe_and_of_differentiate(tiny_model):
    config = AssignedConfig()
    assert (config.filters_per_class, config.solo_weight, config.gated_weight, config.mask_classifier) == (
        None,
        3.0,
        0.0,
        True,
    )
    assert timm_csg.differentiate(tiny_model).mechanism.config == config
