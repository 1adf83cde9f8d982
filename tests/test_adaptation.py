"""adapt: the masked classifier against scikit-learn, and the whole of it on models that are not trained."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assigned as reference
from sklearn.linear_model import LogisticRegression
from torch import nn

import timm_csg
from timm_csg import adapt
from timm_csg.adaptation import fit_masked_classifier


def clusters(pictures=120, num_classes=3, num_filters=9, spread=1.0, seed=0):
    """Responses in which filter k is larger for class k modulo classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(pictures) % num_classes
    own = targets[:, None] == torch.arange(num_filters) % num_classes
    return spread * torch.randn(pictures, num_filters, generator=generator) + own, targets


def blind(num_classes, num_filters):
    return torch.arange(num_filters) % num_classes == torch.arange(num_classes)[:, None]


# The masked classifier


def test_classifier_that_may_use_everything_is_scikit_learns():
    inputs, targets = clusters()
    found = fit_masked_classifier(inputs, targets, torch.ones(3, 9, dtype=torch.bool))
    inverse = 1 / (found.penalty * len(inputs))  # scikit-learn: C × Σ cross entropy + Σ w² / 2
    standard = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0, correction=0)
    expected = LogisticRegression(C=inverse, tol=1e-8, max_iter=5000).fit(standard, targets)
    logits = F.linear(inputs, found.weight, found.bias)
    np.testing.assert_allclose(logits.softmax(dim=1), expected.predict_proba(standard), atol=2e-3)


def test_two_exclusive_classes_are_one_logistic_regression():
    """With an exclusive mask and two classes the difference of logits is w₀·x₀ - w₁·x₁ + b: all of it is one fit."""
    inputs, targets = clusters(num_classes=2, num_filters=8)
    own = blind(2, 8)
    found = fit_masked_classifier(inputs, targets, own)
    assert not found.weight[~own].any()
    inverse = 1 / (found.penalty * len(inputs))
    standard = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0, correction=0)
    expected = LogisticRegression(C=inverse, tol=1e-8, max_iter=5000).fit(standard, targets)
    logits = F.linear(inputs, found.weight, found.bias)
    np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected.decision_function(standard), atol=5e-3)


def test_every_own_weight_is_at_the_minimum_of_the_penalised_cross_entropy():
    inputs, targets = clusters()
    own = blind(3, 9)
    found = fit_masked_classifier(inputs, targets, own)
    deviation = inputs.double().std(dim=0, correction=0)
    weight = (found.weight.double() * deviation).requires_grad_()
    bias = (found.bias.double() + found.weight.double() @ inputs.double().mean(dim=0)).requires_grad_()
    standard = (inputs.double() - inputs.double().mean(dim=0)) / deviation
    loss = F.cross_entropy(F.linear(standard, weight, bias), targets) + found.penalty / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad[own].abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_penalty_suits_what_is_held_out(spread):
    found = fit_masked_classifier(*clusters(spread=spread), blind(3, 9))
    assert found.held_out_accuracy > 0.4
    assert found.penalty in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


def test_clear_responses_want_a_small_penalty_and_noise_a_large_one():
    clear, noise = (fit_masked_classifier(*clusters(spread=spread), blind(3, 9)) for spread in (0.05, 20.0))
    assert clear.penalty == 0.003
    assert clear.held_out_accuracy == 1.0
    assert noise.penalty == 1.0


def test_scale_and_offset_of_the_filters_do_not_matter():
    inputs, targets = clusters()
    expected = fit_masked_classifier(inputs, targets, blind(3, 9))
    scale, offset = torch.logspace(-3, 3, 9), torch.linspace(-5, 5, 9)
    found = fit_masked_classifier(inputs * scale + offset, targets, blind(3, 9))
    logits = F.linear(inputs * scale + offset, found.weight, found.bias)
    torch.testing.assert_close(logits, F.linear(inputs, expected.weight, expected.bias), rtol=1e-2, atol=1e-2)


def test_constant_filters_get_no_weight():
    inputs, targets = clusters()
    inputs[:, 4] = 0.1
    found = fit_masked_classifier(inputs, targets, blind(3, 9))
    assert not found.weight[:, 4].any()
    assert found.weight.isfinite().all()
    assert found.bias.isfinite().all()


def test_too_few_pictures_to_hold_one_out_are_fitted_with_the_largest_penalty():
    found = fit_masked_classifier(*clusters(pictures=3), blind(3, 9))
    assert found.penalty == 1.0
    assert math.isnan(found.held_out_accuracy)


def test_soft_targets_are_fitted_too():
    inputs, targets = clusters()
    indices = fit_masked_classifier(inputs, targets, blind(3, 9))
    rows = fit_masked_classifier(inputs, F.one_hot(targets, 3).float(), blind(3, 9))
    torch.testing.assert_close(rows.weight, indices.weight, rtol=1e-2, atol=1e-3)


# The whole


def coloured(count=60, num_classes=5, seed=3):
    """Noise with a stripe whose place tells the class."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.rand(count, 3, 64, 64, generator=generator), torch.arange(count) % num_classes
    for image, target in zip(images, targets, strict=True):
        image[:, 8 * target : 8 * target + 8] += 2
    return images, targets


def batches(images, targets, size=16):
    return list(zip(images.split(size), targets.split(size), strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_adapted_model_answers_with_a_classes_own_filters_alone(make_model, name):
    model = timm_csg.differentiate(make_model(name))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images, targets = coloured()
    found = adapt(model, batches(images, targets))
    own, classifier = found.assignment.matrix, model.get_classifier()
    assert torch.equal(model.mechanism.assignment, own)
    assert not classifier.weight.flatten(1)[~own].any()
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == targets).float().mean()
    assert accuracy > 0.5
    assert 0 <= found.held_out_accuracy <= 1
    name = next(key for key, value in model.named_modules() if value is classifier)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert all(key.startswith(("mechanism.", f"{name}.")) for key in changed)


def test_assignment_is_that_of_assign_filters(make_model):
    pictures = batches(*coloured())
    found = adapt(timm_csg.differentiate(make_model()), pictures)
    expected = timm_csg.assign_filters(timm_csg.differentiate(make_model()), pictures)
    assert torch.equal(found.assignment.matrix, expected.matrix)


def test_named_number_of_filters_is_kept_to(make_model):
    model = timm_csg.differentiate(make_model(), filters_per_class=2)
    adapt(model, batches(*coloured()))
    assert (model.fc.weight != 0).sum(dim=1).tolist() == [2] * 5


def test_logits_are_those_of_the_fit_on_what_the_classifier_sees(make_model):
    model = timm_csg.differentiate(make_model("test_convnext"))
    images, targets = coloured()
    adapt(model, batches(images, targets))
    with torch.no_grad():
        seen = model.forward_head(model.forward_features(images), pre_logits=True)
        fit = fit_masked_classifier(seen, targets, model.mechanism.assignment)
        torch.testing.assert_close(model(images), F.linear(seen, fit.weight, fit.bias), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("test_mambaout", {}, "its head is of kind 'pooled'"),
        ("test_resnet", {"mask_classifier": False}, "its classifier is not masked"),
    ],
)
def test_models_without_a_masked_classifier_are_refused_with_the_remedy(make_model, name, options, words):
    model = timm_csg.differentiate(make_model(name), **options)
    with pytest.raises(ValueError, match=rf"{words}.*fine-tune with assign_filters\(\) instead"):
        adapt(model, batches(*coloured()))
    assert model.mechanism.is_blind


def test_multi_hot_targets_are_refused_before_anything_changes(make_model):
    model = timm_csg.differentiate(make_model())
    before = model.fc.weight.clone()
    images, targets = coloured()
    rows = F.one_hot(targets, 5) | F.one_hot((targets + 1) % 5, 5)
    with pytest.raises(ValueError, match="one class for each picture, but targets are multi-hot; fine-tune"):
        adapt(model, batches(images, rows))
    assert torch.equal(model.fc.weight, before)
    assert model.mechanism.is_blind


def test_plain_model_is_refused(make_model):
    with pytest.raises(TypeError, match="expected a differentiated model, but found ResNet"):
        adapt(make_model(), batches(*coloured()))


def test_classifier_without_a_bias_is_fitted_without_one(make_model):
    model = make_model()
    model.fc = nn.Linear(96, 5, bias=False)
    model = timm_csg.differentiate(model)
    images, targets = coloured()
    adapt(model, batches(images, targets))
    with torch.no_grad():
        assert (model(images).argmax(dim=1) == targets).float().mean() > 0.5


def test_adapted_model_has_owners_that_mutual_information_confirms(make_model):
    """On responses made for it: a class's filters are those that correlate with it."""
    responses, targets = clusters(pictures=90, spread=0.3)
    correlations = reference.correlation(responses.numpy(), F.one_hot(targets, 3).numpy())
    assert np.array_equal(np.argmax(correlations, axis=0), np.arange(9) % 3)
