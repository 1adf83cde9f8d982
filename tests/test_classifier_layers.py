"""Classifiers that do more than their ``weight`` says: what a layer really multiplies with counts, or a refusal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import timm_csg
from timm_csg import explain
from timm_csg.head import effective_weight, find_classifier, is_plain_layer


class LowRank(nn.Module):
    """As peft's: a frozen base layer and a learned correction; ``weight`` is the base's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.in_features, self.out_features = base.weight.shape[1], base.weight.shape[0]
        kind = nn.Linear if isinstance(base, nn.Linear) else lambda *sizes, bias: nn.Conv2d(*sizes, 1, bias=bias)
        self.a = kind(self.in_features, 2, bias=False)
        self.b = kind(2, self.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + 3 * self.b(self.a(x))

    def merged(self):
        layer = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            correction = 3 * self.b.weight.flatten(1) @ self.a.weight.flatten(1)
            layer.weight += correction.reshape(layer.weight.shape)
        return layer


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        layer.weight_orig *= 2  # an optimizer step: .weight is stale until the next forward
    return layer


def weight_normed(layer):
    weight_norm(layer)
    with torch.no_grad():
        layer.weight_g *= 2
    return layer


class Twice(nn.Linear):
    """A subclass with a forward of its own beside a weight of its own, as loralib's."""

    def forward(self, x):
        return 2 * super().forward(x)


class TwiceConvolved(nn.Conv2d):
    """The same as a 1x1 convolution."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_own_forward(layer):
    layer.__class__ = Twice if isinstance(layer, nn.Linear) else TwiceConvolved
    return layer


CHANGES = {
    "own forward": with_own_forward,
    "low rank": LowRank,
    "pruned": pruned,
    "weight norm": weight_normed,
    "spectral norm": lambda layer: spectral_norm(layer).eval(),
    "parametrized": parametrizations.weight_norm,
}


def direct(layer, inputs):
    """What a layer makes of inputs, without weights: its own forward."""
    with torch.no_grad():
        return layer(inputs)


@pytest.fixture(params=CHANGES)
def change(request):
    return CHANGES[request.param]


def changed_model(make_model, change, mechanism="csg"):
    model = timm_csg.differentiate(make_model(), mechanism=mechanism)
    torch.manual_seed(3)
    model.fc = change(model.fc)
    return model.eval()


@pytest.mark.parametrize("make_layer", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 1)], ids=["linear", "1x1"])
def test_effective_weight_is_what_the_layer_multiplies_with(make_layer, change):
    layer = change(make_layer()).eval()
    inputs = torch.rand(3, 6)
    given = inputs if "Conv" not in str(layer) else inputs[:, :, None, None]
    torch.testing.assert_close(F.linear(inputs, *effective_weight(layer)), direct(layer, given).flatten(1))


def test_plain_layers_are_read_and_not_computed():
    for layer in (nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.Linear(3, 2, bias=False)):
        weight, bias = effective_weight(layer)
        assert weight.data_ptr() == layer.weight.data_ptr()
        assert bias is layer.bias
        assert is_plain_layer(layer)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_layers_that_do_more_are_no_plain_ones(name):
    layer = CHANGES[name](nn.Linear(3, 2))
    assert is_plain_layer(layer) is False


def test_gradients_reach_what_the_effective_weight_is_made_of():
    layer = LowRank(nn.Linear(6, 4))
    effective_weight(layer)[0].square().sum().backward()
    assert layer.a.weight.grad.abs().sum() > 0
    assert layer.base_layer.weight.grad is None


def test_cam_is_that_of_the_layer_in_use(make_model, images, change):
    model = changed_model(make_model, change)
    found = explain.cam(model, images, 1, upsample=False)
    with torch.no_grad():
        maps = model.forward_features(images)
        of_positions = direct(model.fc, maps.permute(0, 2, 3, 1)) - direct(model.fc, torch.zeros(maps.shape[1]))
    torch.testing.assert_close(found, of_positions[..., 1], rtol=1e-4, atol=1e-5)


def test_mechanisms_see_what_a_classifier_really_multiplies_with(make_model, change):
    model = changed_model(make_model, change, mechanism="assigned")
    head, pooled = model.read_head(), torch.rand(3, 96)
    assert head.kind == "linear"
    torch.testing.assert_close(F.linear(pooled, head.weight, head.bias), direct(model.fc, pooled))


def test_masking_a_classifier_that_is_more_than_its_weight_is_refused(make_model, images):
    model = timm_csg.differentiate(make_model(), mechanism="assigned")
    model.project_()
    model.fc = LowRank(model.fc)
    loader = [(images.repeat(4, 1, 1, 1)[:10], torch.arange(10) % 5)]
    calls = (model.project_, lambda: timm_csg.adapt(model, loader), lambda: timm_csg.assign_filters(model, loader))
    for call in calls:
        with pytest.raises(ValueError, match=r"is more than its weight \(LoRA.*mask_classifier=False"):
            call()
    model.fc = model.fc.merged()
    model.project_()
    free = timm_csg.differentiate(make_model(), mechanism="assigned", mask_classifier=False)
    free.fc = LowRank(free.fc)
    free.project_()


def test_nothing_stale_is_kept_when_a_classifier_is_replaced(make_model):
    model = timm_csg.differentiate(make_model(), mechanism="assigned")
    assert model.head_kind == "linear"
    model.fc = nn.Sequential(nn.Linear(96, 7), nn.ReLU(), nn.Linear(7, 5))
    assert model.head_kind == "pooled"
    assert copy.deepcopy(model).head_kind == "pooled"


def test_classifier_that_is_no_linear_layer_for_all_its_attributes_is_seen_through(make_model, images):
    class Cosine(nn.Linear):
        def forward(self, x):
            return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)

    model = make_model()
    model.fc = Cosine(96, 5)
    with pytest.raises(ValueError, match="CAM needs a head that is pooling → linear"):
        explain.cam(model.eval(), images)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore")
def test_quantised_classifier_is_read_through_its_function(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").eval()
    expected = model.read_head()
    small = quantised(model)
    found = small.read_head()
    assert found.kind == "linear"
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=0.02 * float(expected.weight.abs().max()))
    torch.testing.assert_close(found.bias, expected.bias)
    with torch.no_grad():
        torch.testing.assert_close(small(images, targets), model(images, targets))  # the gated path has its own weights


@pytest.mark.filterwarnings("ignore")
def test_explaining_a_quantised_model_is_refused_for_the_right_reason(make_model, images):
    with pytest.raises(ValueError, match=r"quantised layers .* pass no gradient back.*from before the conversion"):
        explain.explain_prediction(quantised(timm_csg.differentiate(make_model(), mechanism="csg").eval()), images)


def test_low_rank_classifier_of_peft(make_model, images):
    peft = pytest.importorskip("peft")
    model = timm_csg.differentiate(make_model(), mechanism="csg").eval()
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False, lora_alpha=32)
    adapted = peft.get_peft_model(model, config)
    before = explain.cam(model, images, 0, upsample=False)
    assert not is_plain_layer(find_classifier(model))
    adapted.merge_and_unload()
    torch.testing.assert_close(explain.cam(model, images, 0, upsample=False), before, rtol=1e-4, atol=1e-5)
