"""What an explanation leaves behind: nothing. And where it works: in no_grad, frozen, bf16, channels_last, wrapped."""

import copy
import gc
import weakref

import pytest
import timm
import torch
from torch import nn

import timm_csg
from timm_csg import explain

METHODS = [
    explain.gradient,
    explain.deconvnet,
    explain.guided_backprop,
    explain.cam,
    explain.grad_cam,
    explain.guided_grad_cam,
    explain.coarse_map,
    explain.filter_maps,
    explain.class_filters,
    explain.explain_prediction,
    explain.activation_counts,
    lambda model, images: explain.strongest_images(model, [images], top=1),
]
HOOKS = [name for name in nn.Module().__dict__ if "hooks" in name]
# These three run everything that the others run.
some_methods = pytest.mark.parametrize(
    "method", [explain.guided_grad_cam, explain.cam, explain.filter_maps], ids=lambda method: method.__name__
)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def state(model):
    """Everything of a model that an explanation could change."""
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in HOOKS if getattr(module, name)],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "random": torch.random.get_rng_state(),
    }


def assert_same(before, after):
    for name, value in before.items():
        if name == "tensors":
            assert all(torch.equal(value[key], after[name][key]) for key in value)
        elif name == "grad":
            pairs = zip(value, after[name], strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
        elif name == "random":
            assert torch.equal(value, after[name])
        else:
            assert value == after[name], name


@pytest.fixture
def lived_in(tiny_model, gated, images, targets):
    """A model in the middle of training: mixed modes, a frozen layer, gradients, somebody's hook."""
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg")).train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    nn.functional.cross_entropy(model(images), targets).backward()
    model.layer3.register_forward_hook(lambda module, inputs, output: None)
    _ = model.head_kind  # learned once and remembered, by design
    return model


@every_method
def test_model_is_left_as_found(lived_in, images, method):
    before = state(lived_in)
    pixels = images.clone()
    method(lived_in, images)
    assert_same(before, state(lived_in))
    assert torch.equal(images, pixels)
    assert not images.requires_grad
    assert torch.is_grad_enabled()


@every_method
def test_model_is_left_as_found_after_an_error(lived_in, images, method, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("in the head")

    monkeypatch.setattr(type(lived_in), "forward_head", fail)
    monkeypatch.setattr(type(lived_in)._plain_class, "forward_features", fail)
    before = state(lived_in)
    with pytest.raises(RuntimeError, match="in the head"):
        method(lived_in, images)
    assert_same(before, state(lived_in))


@some_methods
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_callers_without_gradients_get_the_same(tiny_model, images, method, context):
    expected = method(tiny_model, images)
    with context():
        found = method(tiny_model, images.clone())
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert not found.is_inference()
    assert not found.requires_grad


@some_methods
def test_frozen_model_is_explained_and_stays_frozen(tiny_model, images, method):
    expected = method(tiny_model, images)
    assert torch.equal(method(tiny_model.requires_grad_(False), images), expected)
    assert not any(parameter.requires_grad for parameter in tiny_model.parameters())


@some_methods
def test_model_in_training_mode_is_explained_as_in_eval_mode(tiny_model, images, method):
    expected = method(tiny_model, images)
    assert torch.equal(method(tiny_model.train(), images), expected)


@pytest.mark.parametrize("method", METHODS[:8], ids=lambda method: method.__name__)
def test_channels_last_and_half_precision_give_nearly_the_same(tiny_model, images, method):
    expected = method(tiny_model, images)
    options = {"memory_format": torch.channels_last}
    found = method(copy.deepcopy(tiny_model).to(**options), images.to(**options))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    found = method(copy.deepcopy(tiny_model).bfloat16(), images.bfloat16())
    assert found.dtype == torch.float32
    assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95
    assert method(copy.deepcopy(tiny_model).bfloat16(), images).shape == expected.shape


@some_methods
def test_double_precision_is_kept(tiny_model, images, method):
    assert method(tiny_model.double(), images).dtype == torch.float64


def test_data_parallel_model_is_explained_by_the_model_inside(tiny_model, images):
    found = explain.guided_grad_cam(nn.DataParallel(tiny_model), images)
    assert torch.equal(found, explain.guided_grad_cam(tiny_model, images))


@pytest.mark.slow
def test_compiled_model_is_explained_by_the_model_inside(tiny_model, images):
    expected = explain.guided_grad_cam(tiny_model, images)
    assert torch.equal(explain.guided_grad_cam(torch.compile(tiny_model), images), expected)
    tiny_model.compile()
    assert torch.equal(explain.guided_grad_cam(tiny_model, images), expected)


def test_checkpointed_model_is_explained_and_stays_checkpointed(tiny_model, images):
    expected = [method(tiny_model, images) for method in METHODS[:8]]
    tiny_model.set_grad_checkpointing(True)
    for method, value in zip(METHODS[:8], expected, strict=True):
        torch.testing.assert_close(method(tiny_model, images), value)
    assert tiny_model.grad_checkpointing


def test_cached_attention_biases_hold_no_graph_and_do_not_go_stale():
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=5, img_size=64).train()
    images = torch.rand(1, 3, 64, 64)
    explain.gradient(model, images)
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    assert caches
    assert not any(caches)
    copy.deepcopy(model)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def used_and_dropped(make_model, methods):
    """Build, use and drop a model; weak references to it and its images, and the hooks it had at the end."""
    model, images = make_model(num_classes=3), torch.rand(1, 3, 32, 32)
    for method in methods:
        method(model, images)
    hooks = [len(getattr(module, name)) for module in model.modules() for name in HOOKS if getattr(module, name)]
    return weakref.ref(model), weakref.ref(images), hooks


@pytest.mark.parametrize("cycles", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_building_using_and_dropping_leaks_nothing(make_model, cycles):
    used_and_dropped(make_model, METHODS)
    before = live_tensors()
    gc.disable()  # so that even a reference cycle shows
    try:
        for _ in range(cycles):
            model, images, hooks = used_and_dropped(make_model, METHODS)
            assert (model(), images(), hooks) == (None, None, [])
    finally:
        gc.enable()
    assert live_tensors() == before


@pytest.mark.parametrize("method", METHODS[:8], ids=lambda method: method.__name__)
def test_result_keeps_no_graph(tiny_model, images, method):
    assert method(tiny_model, images).grad_fn is None
