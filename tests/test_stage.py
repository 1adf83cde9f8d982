"""find_stage: what it measures, that it touches nothing, and what it refuses with which remedy."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._input import get_model_input_config
from torch import nn
from torch.nn.utils import prune

import timm_csg


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


class Traced(nn.Module):
    """The seam of a timm model without the model, for tracing."""

    def forward(self, x):
        return x


@pytest.fixture
def process_group(tmp_path):
    """A group of this one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", timm_csg.Stage("layer4", 96, "NCHW", (5, 5), signed=False)),
        ("test_byobnet", timm_csg.Stage("final_conv", 256, "NCHW", (5, 5), signed=False)),
        ("test_efficientnet", timm_csg.Stage("bn2", 256, "NCHW", (5, 5), signed=True)),
        ("test_convnext", timm_csg.Stage("norm_pre", 64, "NCHW", (5, 5), signed=True)),
        ("test_mambaout", timm_csg.Stage("stages", 64, "NHWC", (5, 5), signed=True)),
        ("test_vit", timm_csg.Stage("norm", 64, "NLC", (10, 10), signed=True)),
    ],
)
def test_stage_of_the_tiny_models(name, expected):
    assert timm_csg.find_stage(timm.create_model(name)) == expected


def test_stage_prints_as_one_line(tiny_model):
    assert str(timm_csg.find_stage(tiny_model)) == "layer4: 96 filters, NCHW, grid 5x5, values >= 0"
    no_grid = timm_csg.Stage("forward_features", 64, "NLC", None, signed=True)
    assert str(no_grid) == "forward_features: 64 filters, NLC, no grid, signed values"


def test_measured_stage_is_the_real_one(any_model):
    stage = timm_csg.find_stage(any_model)
    size = get_model_input_config(any_model)["input_size"]
    with torch.no_grad():
        features = any_model.forward_features(torch.rand(1, *size))
    assert stage.num_filters == features.shape[1 if stage.layout == "NCHW" else -1] == any_model.num_features
    if stage.layout == "NLC":
        assert stage.grid[0] * stage.grid[1] + any_model.num_prefix_tokens == features.shape[1]
    else:
        assert stage.grid == tuple(features.shape[2:] if stage.layout == "NCHW" else features.shape[1:3])


@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_nothing(any_model, training):
    any_model.train(training)
    next(any_model.parameters()).grad = torch.ones_like(next(any_model.parameters()))
    next(any_model.parameters()).requires_grad_(False)
    before = copy.deepcopy(any_model.state_dict())
    modes = [module.training for module in any_model.modules()]
    grads = [(parameter.requires_grad, parameter.grad) for parameter in any_model.parameters()]
    attributes = [set(module.__dict__) for module in any_model.modules()]
    rng = torch.random.get_rng_state()
    timm_csg.find_stage(any_model)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert [module.training for module in any_model.modules()] == modes
    assert all(
        parameter.requires_grad == requires and parameter.grad is grad
        for parameter, (requires, grad) in zip(any_model.parameters(), grads, strict=True)
    )
    assert [set(module.__dict__) for module in any_model.modules()] == attributes
    assert not any(module._forward_hooks for module in any_model.modules())
    assert all(torch.equal(value, before[key]) for key, value in any_model.state_dict().items())


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224"])
def test_model_with_cached_attention_biases_can_still_be_copied(name):
    model = timm.create_model(name)
    timm_csg.find_stage(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_differentiated_model_has_the_stage_of_its_plain_self(any_model, mechanism):
    expected = timm_csg.find_stage(any_model)
    assert timm_csg.find_stage(timm_csg.differentiate(any_model, mechanism=mechanism)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_model_can_be_measured(tiny_model, dtype):
    expected = timm_csg.find_stage(tiny_model)
    assert timm_csg.find_stage(tiny_model.to(dtype)) == expected


def test_model_on_the_meta_device_can_be_measured():
    assert timm_csg.find_stage(on_meta("resnet18")).grid == (7, 7)


def test_input_channels_and_image_size_are_those_of_the_model():
    assert timm_csg.find_stage(timm.create_model("test_resnet", in_chans=1)).num_filters == 96
    assert timm_csg.find_stage(timm.create_model("test_vit", img_size=64)).grid == (4, 4)


def test_tied_parameters_do_not_disturb(tiny_model):
    tiny_model.layer4[0].bn1.weight = tiny_model.layer4[0].bn2.weight
    assert timm_csg.find_stage(tiny_model).num_filters == 96


@pytest.mark.parametrize(
    ("ending", "signed"),
    [
        (F.relu, False),
        (torch.sigmoid, False),
        (F.relu6, False),
        (lambda x: x.clamp(min=0), False),
        (lambda x: F.relu(x) + F.relu(-x), False),
        (lambda x: F.max_pool2d(F.relu(x), 2), False),
        (lambda x: F.relu(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), False),
        (lambda x: F.relu(x) * 0.5, False),
        (F.silu, True),
        (F.gelu, True),
        (torch.tanh, True),
        (lambda x: x.clamp(min=-1), True),
        (lambda x: F.relu(x) + x, True),
        (lambda x: F.relu(x) - 0.5, True),
        (lambda x: F.relu(x) * -1, True),
        (lambda x: F.relu(x) + (-1), True),
        (lambda x: F.relu(x) / -2, True),
        (lambda x: F.relu(x).mul_(-1.0), True),
        (lambda x: F.relu(x).neg_(), True),
        (lambda x: torch.add(F.relu(x), F.relu(x), alpha=-1), True),
        (lambda x: F.pad(F.relu(x), (1, 1), value=-1.0), True),
        (lambda x: F.interpolate(F.relu(x), scale_factor=2.0, mode="bicubic"), True),
    ],
)
def test_sign_follows_from_the_last_operations(tiny_model, monkeypatch, ending, signed):
    backbone = type(tiny_model).forward_features
    monkeypatch.setattr(type(tiny_model), "forward_features", lambda self, x: ending(backbone(self, x) - 0.1))
    assert timm_csg.find_stage(tiny_model).signed is signed


def unsupported():
    """Name, what is given, the error, and words that its message must hold: what was found and the remedy."""
    yield "name of a model", lambda make: "resnet18", TypeError, "str.*timm.create_model"
    yield "DataParallel", lambda make: nn.DataParallel(make()), TypeError, "DataParallel.*inner model"
    yield "torch.compile", lambda make: torch.compile(make(), backend="eager"), TypeError, "compiled.*original"
    yield "model.compile", lambda make: compiled_in_place(make()), TypeError, "compiled.*original"
    yield "features_only", lambda make: make(features_only=True), TypeError, "without features_only"
    yield "torchvision", torchvision_model, TypeError, "forward_features.*timm.create_model"
    yield "any module", lambda make: nn.Linear(2, 2), TypeError, "Linear is not a timm classifier.*timm.create_model"
    yield "scripted", lambda make: torch.jit.script(make("test_vit")), TypeError, "scripted.*original timm model"
    yield "traced", lambda make: torch.jit.trace(make(), torch.rand(1, 3, 64, 64)), TypeError, "traced.*original timm"
    yield "fx", lambda make: torch.fx.symbolic_trace(Traced()), TypeError, "traced.*original timm model"
    for name in ("coat_tiny", "crossvit_tiny_240", "efficientvim_m1"):
        yield name, lambda make, name=name: on_meta(name), ValueError, "several tensors.*use a model with one stream"
    yield "aux logits", lambda make: on_meta("inception_v3", aux_logits=True), ValueError, "several tensors.*use"
    for name in timm.list_models("*_enc"):
        yield name, lambda make, name=name: on_meta(name), TypeError, "encoder without a classifier.*'_enc'"


def torchvision_model(make):
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18()


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("function", [timm_csg.find_stage, timm_csg.differentiate])
@pytest.mark.parametrize("case", unsupported(), ids=lambda case: case[0])
@pytest.mark.filterwarnings("ignore")
def test_unsupported_models_are_refused_with_the_remedy(make_model, case, function):
    _, build, error, words = case
    model = build(make_model)
    with pytest.raises(error, match=re.compile(words, re.DOTALL)):
        function(model)
    assert not timm_csg.is_differentiated(model)


def test_there_are_seven_encoders():
    assert len(timm.list_models("*_enc")) == 7


@pytest.mark.parametrize("function", [timm_csg.find_stage, timm_csg.differentiate])
def test_model_in_distributed_data_parallel_is_refused_with_the_remedy(tiny_model, process_group, function):
    with pytest.raises(TypeError, match=r"DistributedDataParallel.*inner model, before wrapping"):
        function(nn.parallel.DistributedDataParallel(tiny_model))


# Models that hold tensors which are neither parameters nor buffers


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientformer_l1", "efficientvit_m0"])
def test_cached_attention_biases_do_not_hide_the_stage(name):
    model = timm.create_model(name).eval()
    expected = timm_csg.find_stage(model)
    size = model.default_cfg["input_size"][1]
    model(torch.rand(1, 3, size, size))  # fills the caches, with a graph
    assert timm_csg.find_stage(model) == expected


def test_tensors_among_a_modules_attributes_do_not_hide_the_stage(make_model):
    model = make_model()
    expected = timm_csg.find_stage(model)
    prune.random_unstructured(model.layer4[0].conv1, "weight", 0.5)
    model.layer4.left_over = {"activations": [torch.rand(1, 96, 5, 5), model.layer4[0].conv1.weight * 2]}
    assert timm_csg.find_stage(model) == expected
    kept = model.layer4.left_over["activations"][0]
    assert type(kept) is torch.Tensor
    assert kept.device.type == "cpu"
