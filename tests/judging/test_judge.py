"""All judges at once: any callable, nothing left behind, and one clear sentence for what cannot be judged."""

import copy
import random

import numpy as np
import pytest
import torch

import timm_csg
from timm_csg import explain, judging

EASY = {name: {"confidence": 0.0} for name in ("grid_2x2", "grid_3x3")}


@pytest.fixture
def right(tiny_model, images):
    """Pictures with the classes that the model sees in them."""
    return images, tiny_model(images).argmax(dim=1)


def test_judges_equal_their_own_functions(colours, pictures, own_colour):
    images, targets = pictures
    boxes = torch.tensor([[1.0, 1.0, 4.0, 5.0]] * len(images))
    found = judging.judge(own_colour, colours, images, targets, objects=boxes, seed=3, batch_size=5)
    assert list(found) == list(judging.JUDGES)
    maps = own_colour(colours, images, targets)
    for name in ("pointing_game", "energy_inside", "plausibility"):
        assert found[name][:2] == getattr(judging, name)(maps, boxes)[:2]
    for name in ("deletion", "insertion", "stability", "weight_randomisation", "random_logit"):
        one = getattr(judging, name)(own_colour, colours, images, targets, seed=3)
        assert found[name].score == pytest.approx(one.score, abs=1e-6)
        assert found[name].chance == pytest.approx(one.chance, abs=1e-6)
    for side in (2, 3):
        one = judging.grid_pointing_game(own_colour, colours, images, targets, side=side, seed=3)
        assert found[f"grid_{side}x{side}"].score == pytest.approx(one.score)
    assert all(one.seconds > 0 for one in found.values())


def test_options_reach_their_judge(colours, pictures, own_colour):
    found = judging.judge(
        own_colour, colours, *pictures, judges=["grid_2x2", "deletion"], options={"grid_2x2": {"grids": 1}}
    )
    assert list(found) == ["grid_2x2", "deletion"]
    assert len(found["grid_2x2"].values) == 4


@pytest.mark.parametrize("mechanism", [None, "assigned", "csg"])
def test_everything_is_left_as_found(mechanism, make_model, images, gated):
    model = make_model()
    if mechanism:
        model = gated(timm_csg.differentiate(model, mechanism=mechanism))
    model.train()
    model.layer1.eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
        parameter.requires_grad_(number % 2 == 0)

    def greedy(model, images, targets):
        torch.rand(3), np.random.rand(3), random.random()
        loss = model(images).gather(1, targets[:, None]).sum()
        loss.backward()  # what some packages do
        return images.mean(dim=1) * (1 + loss.item())

    before = copy.deepcopy(model.state_dict())
    grads = [parameter.grad for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    state, numpy, python = torch.random.get_rng_state(), np.random.get_state()[1], random.getstate()
    judging.judge(greedy, model, images, torch.tensor([0, 1, 2]), objects=torch.tensor([[2.0, 2.0, 30.0, 30.0]] * 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert all(bool((grad == number).all()) for number, grad in enumerate(grads))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy).all()
    assert random.getstate() == python


def test_everything_is_left_as_found_when_an_explanation_fails(tiny_model, right):
    before = copy.deepcopy(tiny_model.state_dict())
    calls = []

    def fails_later(model, images, targets):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return images.mean(dim=1)

    tiny_model.train()
    with pytest.raises(KeyboardInterrupt):
        judging.weight_randomisation(fails_later, tiny_model, *right)
    assert tiny_model.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_the_same_seed_gives_the_same_answers_wherever_it_is_called(tiny_model, right):
    with torch.no_grad():
        first = judging.judge(judging.noise_map, tiny_model, *right)
    torch.rand(7)
    with torch.inference_mode():
        second = judging.judge(judging.noise_map, tiny_model, *right)
    assert [one[:2] for one in first.values()] == [one[:2] for one in second.values()]
    gradient = judging.judge(
        lambda *given: explain.gradient(*given).sum(dim=1), tiny_model, *right, judges=["deletion"]
    )
    assert 0 <= gradient["deletion"].score <= 1


def test_arrays_are_maps_too(tiny_model, right):
    arrays = judging.judge(lambda *given: explain.cam(*given).numpy(), tiny_model, *right, judges=["deletion"])
    assert arrays["deletion"][:2] == judging.judge(explain.cam, tiny_model, *right, judges=["deletion"])["deletion"][:2]


@pytest.mark.parametrize(
    ("explanation", "message"),
    [
        (lambda model, images, targets: images, r"one map as large as each image, \[3, 64, 64\], .* \[3, 3, 64, 64\]"),
        (lambda model, images, targets: explain.cam(model, images, targets, upsample=False), r"resize coarse maps"),
        (lambda model, images, targets: images[:2].mean(dim=1), r"returned \[2, 64, 64\]"),
        (lambda model, images, targets: images.mean(dim=1) / 0 * 0, r"not finite for 3 of 3 images"),
        (lambda model, images, targets: None, "returned NoneType"),
    ],
)
def test_wrong_maps_are_said_in_one_sentence(explanation, message, tiny_model, right):
    with pytest.raises((TypeError, ValueError), match=message):
        judging.judge(explanation, tiny_model, *right)


def test_wrong_arguments_are_said_in_one_sentence(tiny_model, right, images):
    with pytest.raises(ValueError, match=r"judges must be one of .*'delition'"):
        judging.judge(explain.cam, tiny_model, *right, judges=["delition"])
    with pytest.raises(ValueError, match="plausibility need objects"):
        judging.judge(explain.cam, tiny_model, *right, judges=["plausibility"])
    with pytest.raises(ValueError, match="class indices from 0 to 4, but they range from 0 to 9"):
        judging.judge(judging.edge_map, tiny_model, images, torch.tensor([0, 1, 9]), judges=["deletion"])
    with pytest.raises(ValueError, match="one target for every image"):
        judging.judge(explain.cam, tiny_model, images, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"images must be \[batch, channels, height, width\]"):
        judging.judge(explain.cam, tiny_model, images[0], torch.tensor([0]))
    with pytest.raises(ValueError, match="steps must be a whole number"):
        judging.deletion(explain.cam, tiny_model, *right, steps=0)
    with pytest.raises(TypeError, match="must return logits"):
        judging.deletion(judging.edge_map, torch.nn.Identity(), *right)


def test_maps_that_know_nothing_need_no_model(images):
    for make in (judging.centre_map, judging.noise_map, judging.edge_map):
        maps = make(None, images, None)
        assert maps.shape == (3, 64, 64)
        assert maps.isfinite().all()
    centre = judging.centre_map(None, images, None)[0]
    torch.testing.assert_close(centre, centre.flip(0, 1))
    step = torch.zeros(1, 3, 4, 6)
    step[..., 3:] = 1
    assert judging.edge_map(None, step, None)[0].tolist() == [[0, 0, 4, 4, 0, 0]] * 4
