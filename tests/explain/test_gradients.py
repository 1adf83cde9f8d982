"""Gradient, deconvnet and guided backprop: hand-computed numbers, literal loops, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from reference import explain as reference
from torch import nn

import timm_csg
from timm_csg.explain import activation_counts, deconvnet, gradient, guided_backprop

# picture a = [[1, -2], [3, -1]], b = -a; pooled after ReLU: a 1, 3 (left), b 2, 1 (right); u = a - b = -1, 2, v = b.
# d logit 0 / d relu(u) = 2 / 2, d relu(v) = -1 / 2, at both places.
BY_HAND = {gradient: [[0.0, 0.5], [1.0, 1.5]], deconvnet: [[1.0, 0.0], [1.0, 0.0]], guided_backprop: [[0, 0], [1.0, 0]]}
RULES = {gradient: "gradient", deconvnet: "deconvnet", guided_backprop: "guided"}
WRITTEN = ["module", "module in place", "functional", "functional in place", "torch", "method", "threshold", "clamp"]
RULED = [deconvnet, guided_backprop]


@pytest.mark.parametrize("method", BY_HAND, ids=lambda method: method.__name__)
@pytest.mark.parametrize("relu", [*WRITTEN, "relu6"])
def test_tiny_net_gives_the_hand_computed_signal_however_its_relu_is_written(tiny_net, picture, method, relu):
    found = method(tiny_net(relu), picture, 0)
    torch.testing.assert_close(found, torch.tensor(BY_HAND[method])[None, None])


class Sequence(nn.Sequential):
    """A stack of layers with the methods of a timm classifier."""

    num_classes, output_fmt = 3, "NCHW"

    def __init__(self, *layers, width):
        super().__init__(*layers)
        self.num_features, self.fc = width, nn.Linear(width, 3)

    def forward_features(self, images):
        for layer in list(self)[:-1]:
            images = layer(images)
        return images

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool=None):
        raise NotImplementedError


@pytest.mark.parametrize("method", RULES, ids=lambda method: method.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_signal_is_that_of_the_literal_loops(method, seed):
    torch.manual_seed(seed)
    convs = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 3)
    relu = nn.ReLU(inplace=True)  # one module, used three times
    net = Sequence(convs[0], relu, nn.MaxPool2d(2), convs[1], relu, convs[2], relu, width=4).eval()
    image = torch.randn(1, 2, 8, 8)
    first, second, third = (("conv", conv.weight.tolist(), conv.bias.tolist(), conv.padding[0]) for conv in convs)
    layers = [first, ("relu",), ("max_pool", 2), second, ("relu",), third, ("relu",)]
    expected = reference.projection(layers, image[0].tolist(), net.fc.weight[1].tolist(), RULES[method])
    torch.testing.assert_close(method(net, image, 1)[0], torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", RULED, ids=lambda method: method.__name__)
@pytest.mark.parametrize(
    ("relu", "named"),
    [
        ("silu", "2 x SiLU"),
        ("hand-written silu", "2 x SiLU"),
        ("mixed", "1 x GELU next to 1 x ReLU"),
        ("leaky", "2 x LeakyReLU"),
        ("none", "no activation function"),
        ("in place on a part", "in place on part of a tensor"),
    ],
)
def test_what_the_rule_does_not_cover_is_refused_with_the_alternative(tiny_net, picture, method, relu, named):
    with pytest.raises(ValueError, match=f"(?s){named}.*explain.grad_cam"):
        method(tiny_net(relu), picture)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "test_vit", "test_efficientnet"])
def test_models_of_timm_without_relu_are_refused(make_model, images, name):
    with pytest.raises(ValueError, match=r"guided backprop is a rule for ReLUs, but \w+ has \d+ x (GELU|SiLU)"):
        guided_backprop(make_model(name), images)


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet"])
def test_every_relu_call_of_a_forward_pass_is_counted(make_model, images, monkeypatch, name):
    model, calls, relu = make_model(name), [], F.relu
    monkeypatch.setattr(F, "relu", lambda *args, **kwargs: calls.append(1) or relu(*args, **kwargs))
    assert activation_counts(model, images) == {"ReLU": len(calls)}


def test_ceiling_of_a_relu6_stops_guided_backprop_and_not_the_deconvnet(tiny_net, picture):
    bright = picture * 10
    assert not guided_backprop(tiny_net("relu6"), bright, 0).any()
    assert torch.equal(deconvnet(tiny_net("relu6"), bright, 0), deconvnet(tiny_net(), bright, 0))


def test_squeeze_and_excitation_is_no_activation_of_its_own(make_model, images):
    model = make_model("test_resnet", block_args={"attn_layer": "se"})
    assert list(activation_counts(model, images)) == ["ReLU"]
    assert guided_backprop(model, images).shape == images.shape


def test_gradient_is_that_of_autograd_for_every_layout(any_model, images, targets):
    leaf = images.clone().requires_grad_()
    any_model(leaf).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(gradient(any_model, images, targets), leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", RULES, ids=lambda method: method.__name__)
def test_targets_are_the_predicted_class_unless_given(tiny_model, images, method):
    predicted = tiny_model(images).argmax(1)
    assert torch.equal(method(tiny_model, images), method(tiny_model, images, predicted))
    assert torch.equal(method(tiny_model, images, 2), method(tiny_model, images, [2, 2, 2]))


def test_images_of_a_batch_do_not_influence_each_other(tiny_model, images, targets):
    alone = torch.cat([guided_backprop(tiny_model, images[i : i + 1], targets[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(guided_backprop(tiny_model, images, targets), alone, rtol=1e-4, atol=1e-6)


def test_differentiated_model_gives_the_plain_models_signal(tiny_model, images, targets, gated):
    plain = guided_backprop(tiny_model, images, targets)
    assert torch.equal(
        guided_backprop(gated(timm_csg.differentiate(tiny_model, mechanism="csg")), images, targets), plain
    )


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"images": torch.zeros(3, 64, 64)}, ValueError, r"images\[None\]"),
        ({"images": torch.zeros(1, 3, 64, 64, dtype=torch.bool)}, TypeError, "holds bool"),
        ({"images": [1, 2]}, TypeError, "floating-point tensor"),
        ({"targets": torch.tensor([0, 1])}, ValueError, "there are 3 images"),
        ({"targets": 5}, ValueError, "between 0 and 4"),
        ({"targets": torch.tensor([0.0, 1.0, 1.0])}, TypeError, "class indices"),
        ({"targets": [None, 1, 2]}, TypeError, "pass the number of a class, counted from 0, or the name"),
        ({"model": nn.Linear(2, 2)}, TypeError, "not a timm classifier"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, images, bad, error, says):
    with pytest.raises(error, match=says):
        gradient(**{"model": tiny_model, "images": images, **bad})
