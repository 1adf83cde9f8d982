"""Stability and sanity checks against SciPy, by hand, and on explanations whose answer is known."""

import pytest
import torch
from reference import judging as reference

from timm_csg import explain, judging


def blind(model, images, targets):
    """Never asks the model."""
    return images.mean(dim=1)


def test_similarity_is_scipys_rank_correlation_with_ties():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, 6, 7, generator=generator).mul(2).round()
    second = first + torch.randn(5, 6, 7, generator=generator).round()
    expected = [reference.rank_correlation(one, other) for one, other in zip(first, second, strict=True)]
    torch.testing.assert_close(judging.map_similarity(first, second), torch.tensor(expected))


def test_constant_maps_are_like_each_other_only():
    flat, other = torch.zeros(1, 3, 3), torch.arange(9.0).view(1, 3, 3)
    assert judging.map_similarity(flat, flat + 4).item() == 1
    assert judging.map_similarity(flat, other).item() == 0
    with pytest.raises(ValueError, match="must both be"):
        judging.map_similarity(flat, other[0])


def test_stability_compares_with_maps_of_noisy_pictures(tiny_model, images, targets):
    shown = []

    def recorded(model, images, targets):
        shown.append(images)
        return explain.grad_cam(model, images, targets)

    found = judging.stability(recorded, tiny_model, images, targets, samples=3, noise=0.5, clip=0.3)
    assert len(shown) == 4
    for noisy in shown[1:]:
        added = noisy - images
        assert 0.29 < added.abs().max() < 0.3001
        assert 0.2 < added.std() < 0.3  # cut at 0.3
    maps = [explain.grad_cam(tiny_model, each, targets) for each in shown]
    expected = torch.stack([judging.map_similarity(maps[0], other) for other in maps[1:]]).mean(dim=0)
    torch.testing.assert_close(found.values, expected)
    by_chance = judging.map_similarity(maps[0], maps[0][[2, 0, 1]]).mean()
    assert found.chance == pytest.approx(float(by_chance))


def test_no_noise_no_change(tiny_model, images, targets):
    assert judging.stability(explain.grad_cam, tiny_model, images, targets, noise=0).score == pytest.approx(1)


def test_an_explanation_that_never_asks_the_model_fails_both_sanity_checks(tiny_model, images, targets):
    for check in (judging.weight_randomisation, judging.random_logit):
        assert check(blind, tiny_model, images, targets).score == pytest.approx(1)


def test_an_explanation_that_draws_noise_draws_another_one_when_it_is_compared(tiny_model, images, targets):
    def noise(model, images, targets):
        return torch.rand(len(images), *images.shape[2:])

    for check in (judging.stability, judging.weight_randomisation, judging.random_logit):
        assert abs(check(noise, tiny_model, images, targets).score) < 0.1


def test_maps_of_the_model_change_with_weights_and_class(tiny_model, images, targets):
    assert judging.weight_randomisation(explain.cam, tiny_model, images, targets).score < 0.9
    assert judging.random_logit(explain.cam, tiny_model, images, targets).score < 0.9


def test_the_cascade_runs_from_the_last_layer_to_the_first_and_is_undone(tiny_model, images, targets):
    before = {name: value.clone() for name, value in tiny_model.named_parameters()}
    changed = []

    def recorded(model, images, targets):
        changed.append({name for name, value in model.named_parameters() if not torch.equal(value, before[name])})
        return blind(model, images, targets)

    judging.weight_randomisation(recorded, tiny_model, images, targets, points=3)
    first, *stages = changed
    assert first == set()
    assert stages[0] < stages[1] < stages[2] == set(before)
    assert "fc.weight" in stages[0]
    assert "conv1.weight" not in stages[1]
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.named_parameters())


def test_shuffled_weights_keep_their_values(tiny_model, images, targets):
    weight = tiny_model.fc.weight.detach().flatten().sort().values

    def recorded(model, images, targets):
        torch.testing.assert_close(model.fc.weight.detach().flatten().sort().values, weight, rtol=0, atol=0)
        return blind(model, images, targets)

    judging.weight_randomisation(recorded, tiny_model, images, targets)


def test_the_other_class_is_never_the_target():
    from timm_csg.judging.sanity import other_classes

    targets = torch.arange(300) % 3
    other = other_classes(targets, 3)
    assert (other != targets).all()
    assert torch.bincount((other - targets) % 3, minlength=3)[1:].min() > 100
    with pytest.raises(ValueError, match="two or more"):
        other_classes(targets, 1)


def test_random_logit_explains_another_class(tiny_model, images, targets):
    asked = []

    def recorded(model, images, targets):
        asked.append(targets)
        return explain.cam(model, images, targets)

    found = judging.random_logit(recorded, tiny_model, images, targets)
    first, second = asked
    assert first.tolist() == targets.tolist()
    assert (second != targets).all()
    expected = judging.map_similarity(explain.cam(tiny_model, images, first), explain.cam(tiny_model, images, second))
    torch.testing.assert_close(found.values, expected)
