"""One call makes what a loop needs: the same as the parts by hand."""

import functools

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

import timm_csg
from timm_csg.recipes import RECIPES


@pytest.fixture
def loader(images):
    return [(images.repeat(2, 1, 1, 1)[:5], torch.arange(5))]


def gate_rates(model, optimizer):
    own = {id(parameter) for parameter in model.mechanism.parameters()}
    return {group["lr"] for group in optimizer.param_groups for parameter in group["params"] if id(parameter) in own}


def test_setup_gives_what_the_parts_give_by_hand(make_model, loader):
    torch.manual_seed(0)
    model, optimizer, loop, ema = timm_csg.setup(
        make_model(), lr=0.01, head_lr=0.04, weight_decay=0.05, loader=loader, optimizer=torch.optim.AdamW
    )
    torch.manual_seed(0)
    by_hand = timm_csg.differentiate(make_model())
    other = timm_csg.TrainingMixin()
    other.schedule = timm_csg.Joint()
    other.assign_filters(by_hand, loader)
    groups = timm_csg.param_groups(by_hand, lr=0.01, head_lr=0.04, gate_lr=0.004, weight_decay=0.05)
    hand_made = torch.optim.AdamW(groups)
    other.attach(hand_made, by_hand)
    assert ema is None
    for its_loop, its_model, its_optimizer in ((loop, model, optimizer), (other, by_hand, hand_made)):
        for images, targets in loader * 2:
            losses = its_loop.losses(its_model.train(), images, targets, cross_entropy)
            losses["loss"].backward()
            its_optimizer.step()
            its_optimizer.zero_grad()
    assert loop.progress == timm_csg.Progress(epoch=0, step=2)
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict(), rtol=0, atol=0)


def test_model_stays_the_object_that_was_given(make_model, loader):
    plain = make_model()
    found = timm_csg.setup(plain, 3, lr=0.1, loader=[(loader[0][0][:3], torch.arange(3))])
    assert found.model is plain
    assert plain.num_classes == 3
    assert bool(plain.mechanism.assigned_from_data)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("optimizer", "share"),
    [
        ("sgd", 1), ("momentum", 1), ("adamw", 0.1), ("lamb", 0.1), (torch.optim.SGD, 1), (torch.optim.Adam, 0.1),
        (functools.partial(torch.optim.SGD, momentum=0.9), 1), (lambda groups: torch.optim.AdamW(groups), 0.1),
    ],
)  # fmt: skip
def test_gate_rate_suits_the_optimizer(make_model, loader, recipe, optimizer, share):
    found = timm_csg.setup(make_model(), recipe=recipe, lr=0.01, optimizer=optimizer, loader=loader)
    share = 1 if RECIPES[recipe].separate_optimizers else share
    rates = gate_rates(found.model, found.optimizer)
    assert bool(rates) == (recipe != "icnn")  # which has no parameters
    assert list(rates) == pytest.approx([RECIPES[recipe].gate_lr * share] * len(rates))
    assert found.loop.schedule == RECIPES[recipe].schedule


def test_average_is_projected_and_has_the_same_assignment(make_model, loader):
    model, optimizer, loop, ema = timm_csg.setup(make_model(), lr=0.5, loader=loader, ema_decay=0.5, optimizer="sgd")
    assert torch.equal(ema.module.mechanism.assignment, model.mechanism.assignment)
    losses = loop.losses(model.train(), *loader[0], cross_entropy)
    losses["loss"].backward()
    optimizer.step()
    ema.update(model)
    assert not ema.module.fc.weight[~ema.module.mechanism.assignment].any()
    assert ema.module.fc.weight.any()


def test_frozen_layers_are_in_no_group(make_model, loader):
    found = timm_csg.setup(make_model(), lr=0.1, loader=loader, freeze="backbone")
    trained = {id(parameter) for group in found.optimizer.param_groups for parameter in group["params"]}
    names = {name.split(".")[0] for name, parameter in found.model.named_parameters() if id(parameter) in trained}
    assert names == {"fc", "mechanism"}


def test_loaded_model_is_trained_on(make_model, loader, tmp_path):
    model = timm_csg.setup(make_model(), lr=0.1, loader=loader).model
    again = timm_csg.from_pretrained(timm_csg.save_pretrained(model, tmp_path / "model"))
    before = again.mechanism.assignment.clone()
    found = timm_csg.setup(again, lr=0.1)
    assert found.model is again
    assert torch.equal(again.mechanism.assignment, before)
    with pytest.raises(ValueError, match=r"differentiated already \(mechanism 'assigned', 5 classes\)"):
        timm_csg.setup(again, recipe="paper", lr=0.1)


def test_what_is_missing_or_too_late_is_said(make_model):
    with pytest.raises(ValueError, match="pass loader="):
        timm_csg.setup(make_model(), lr=0.1)
    with pytest.raises(ValueError, match=r"recipe must be one of .*Did you mean 'paper'"):
        timm_csg.setup(make_model(), recipe="papr", lr=0.1)
    model = make_model()
    with pytest.raises(TypeError, match=r"optimizer=torch.optim.SGD"):
        timm_csg.setup(model, lr=0.1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"no optimizer 'adamx'.*Did you mean 'adam"):
        timm_csg.setup(model, lr=0.1, optimizer="adamx")
    assert not timm_csg.is_differentiated(model)


# differentiate(recipe=...)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_brings_its_mechanism(recipe, make_model):
    model = timm_csg.differentiate(make_model(), recipe=recipe)
    assert model.mechanism.config == RECIPES[recipe].mechanism


def test_options_go_over_those_of_the_recipe(make_model):
    model = timm_csg.differentiate(make_model(), 3, recipe="icnn", beta=2.0)
    assert (model.mechanism.config.beta, model.mechanism.config.strength, model.num_classes) == (2.0, 20.0, 3)
    with pytest.raises(ValueError, match=r"ICNNConfig has no option sparsity_weight"):
        timm_csg.differentiate(make_model(), recipe="icnn", sparsity_weight=1.0)


def test_recipe_and_mechanism_exclude_each_other():
    with pytest.raises(ValueError, match="give a recipe or a mechanism, but got recipe='paper' and mechanism='csg'"):
        timm_csg.differentiate(timm.create_model("test_resnet"), mechanism="csg", recipe="paper")
