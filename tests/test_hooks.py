"""Hooks of the user's own: those that change an output are seen or refused, all others change and cost nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import timm_csg
from timm_csg import explain, measuring
from timm_csg.checkpoint import save_plain
from timm_csg.head import effective_weight, is_plain_layer
from timm_csg.hooks import changes_layer


def twice(module, inputs, output):
    return 2 * output


def shifted(module, inputs):
    return (inputs[0] + 1,)


def squashed(module, inputs, output):
    return output.softmax(dim=-1)


def put_on_instance(layer):
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)


CHANGES = {
    "output": lambda layer: layer.register_forward_hook(twice),
    "input": lambda layer: layer.register_forward_pre_hook(shifted),
    "forward": put_on_instance,
}


@pytest.fixture(params=CHANGES)
def change(request):
    return CHANGES[request.param]


class Recorder:
    """A hook that looks and changes nothing."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, *args):
        self.calls += 1


def loader_of(images):
    return [(images.repeat(4, 1, 1, 1)[:10], torch.arange(10) % 5)]


@pytest.mark.parametrize("make_layer", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 1)], ids=["linear", "1x1"])
def test_effective_weight_is_that_of_a_hooked_layer(make_layer, change):
    layer = make_layer()
    change(layer)
    inputs = torch.rand(3, 6)
    with torch.no_grad():
        expected = layer(inputs if isinstance(layer, nn.Linear) else inputs[:, :, None, None]).flatten(1)
    assert not is_plain_layer(layer)
    torch.testing.assert_close(F.linear(inputs, *effective_weight(layer)), expected)


def test_cam_is_that_of_the_hooked_layer(make_model, images, change):
    for model in (make_model(), timm_csg.differentiate(make_model(), mechanism="csg")):
        plain = explain.cam(model, images, 1, upsample=False)
        change(model.fc)
        factor = 1 if model.fc._forward_pre_hooks else 2
        torch.testing.assert_close(explain.cam(model, images, 1, upsample=False), factor * plain, rtol=1e-4, atol=1e-5)


def test_head_is_probed_again_when_hooks_of_the_head_change(make_model, images):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").eval()
    assert (model.read_head().kind, model.read_head().pools_by_mean) == ("linear", True)
    handle = model.fc.register_forward_hook(squashed)
    assert model.read_head().kind == "pooled"
    handle.remove()
    handle = model.global_pool.register_forward_hook(twice)
    assert (model.read_head().kind, model.read_head().pools_by_mean) == ("linear", False)
    with torch.no_grad():
        features = model.forward_features(images)
        responses = model.mechanism.responses(features, model.read_head())
    torch.testing.assert_close(responses, 2 * features.mean(dim=(2, 3)))
    handle.remove()
    assert (model.read_head().kind, model.read_head().pools_by_mean) == ("linear", True)
    assert model.read_head().is_plain


@pytest.mark.parametrize("differentiated", [False, True])
def test_cam_of_a_layer_that_a_hook_makes_more_than_linear_is_refused(make_model, images, differentiated):
    model = timm_csg.differentiate(make_model(), mechanism="csg") if differentiated else make_model()
    explain.cam(model, images)
    handle = model.fc.register_forward_hook(squashed)
    with pytest.raises(ValueError, match=r"CAM needs .* use explain\.grad_cam.* hooks are on fc; .*remove\(\) it"):
        explain.cam(model, images)
    explain.grad_cam(model, images)
    handle.remove()
    explain.cam(model, images)


def test_classifier_that_a_hook_changes_is_not_masked(make_model, images, change):
    model = timm_csg.differentiate(make_model(), mechanism="assigned")
    change(model.fc)
    for call in (model.project_, lambda: timm_csg.assign_filters(model, loader_of(images))):
        with pytest.raises(ValueError, match=r"more than its weight \(.*forward hooks.*remove what was put on it"):
            call()


def test_hooks_that_only_look_change_nothing_and_run_once(make_model, images):
    model, seen = timm_csg.differentiate(make_model(), mechanism="assigned"), Recorder()
    expected = model.read_head()
    handles = [model.fc.register_forward_hook(seen), model.fc.register_forward_pre_hook(seen)]
    model.fc.forward = model.fc.forward  # as accelerate leaves it
    model.train()
    before, modes = torch.random.get_rng_state(), [module.training for module in model.modules()]
    head = model.read_head()
    assert head.is_plain
    assert head.weight.data_ptr() == expected.weight.data_ptr()
    calls = seen.calls
    for _ in range(3):
        model.read_head()
        model.project_()
    assert seen.calls == calls
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert [len(model.fc._forward_hooks), len(model.fc._forward_pre_hooks)] == [1, 1]
    assert all(handle.hooks_dict_ref() is not None for handle in handles)


def test_hooks_that_act_in_training_only_leave_the_layer_plain():
    layer = nn.Linear(4, 2).train()
    layer.register_forward_hook(lambda module, inputs, output: F.dropout(output, training=module.training))
    state = torch.random.get_rng_state()
    assert is_plain_layer(layer)
    assert layer.training
    layer.register_forward_hook(lambda module, inputs, output: F.dropout(output))
    assert not is_plain_layer(layer)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_layer_is_called_without_hooks(monkeypatch):
    layer = nn.Linear(4, 2)
    monkeypatch.setattr(nn.Linear, "__call__", lambda *args: pytest.fail("the layer was called"))
    assert not changes_layer(layer)
    assert is_plain_layer(layer)


def test_layers_that_cannot_be_called_yet_count_as_plain():
    layer = nn.Linear(4, 2, device="meta")
    layer.register_forward_hook(twice)
    assert is_plain_layer(layer)


def test_copies_are_compared_on_their_own():
    layer = nn.Linear(4, 2)
    layer.register_forward_hook(lambda module, inputs, output: output + module.shift)
    layer.shift = 0
    assert is_plain_layer(layer)
    other = copy.deepcopy(layer)
    other.shift = 1
    assert not is_plain_layer(other)


STAGE_AND_HEAD = {
    "explain": lambda model, images: explain.grad_cam(model, images),
    "reasons": lambda model, images: explain.explain_prediction(model, images),
    "collect": lambda model, images: measuring.collect(model, loader_of(images)),
    "assign": lambda model, images: timm_csg.assign_filters(model, loader_of(images)),
}


@pytest.mark.parametrize("name", STAGE_AND_HEAD)
@pytest.mark.parametrize("kind", ["output", "input"])
def test_hook_on_the_model_that_changes_its_logits_is_refused(make_model, images, name, kind):
    model = timm_csg.differentiate(make_model(), mechanism="assigned")
    handle = CHANGES[kind](model)
    with pytest.raises(ValueError, match=r"forward hook on ResNet changes .*remove\(\) .*get_classifier"):
        STAGE_AND_HEAD[name](model, images)
    handle.remove()
    STAGE_AND_HEAD[name](model, images)


def test_hook_on_the_model_that_only_looks_is_left_alone(make_model, images):
    model, seen = make_model(), Recorder()
    expected = explain.grad_cam(model, images)
    model.register_forward_hook(seen)
    for _ in range(2):
        torch.testing.assert_close(explain.grad_cam(model, images), expected)
    assert seen.calls == 1


def test_hook_on_the_model_is_refused_before_the_first_training_step(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg").train()
    model.register_forward_hook(lambda module, inputs, output: output)
    model.register_forward_pre_hook(shifted)
    loop = timm_csg.TrainingMixin()
    with pytest.raises(ValueError, match="forward hook on ResNet changes"):
        loop.losses(model, images, targets, F.cross_entropy)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("where", ["classifier", "model"])
def test_model_whose_hooks_change_its_logits_is_not_saved(make_model, tmp_path, where, differentiated):
    model = timm_csg.differentiate(make_model(), mechanism="csg") if differentiated else make_model()
    save = timm_csg.save_pretrained if differentiated else save_plain
    module = model if where == "model" else model.fc
    module.register_forward_hook(Recorder())
    save(model, tmp_path / "first")
    module.register_forward_hook(squashed)
    with pytest.raises(ValueError, match=r"hook changes the logits of ResNet, .* remove\(\)"):
        save(model, tmp_path / "second")
    assert not (tmp_path / "second").exists()
