"""CAM, Grad-CAM and their relatives: hand-computed numbers, literal loops, every layout, both paths, and refusals."""

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import explain as reference
from torch import nn

import timm_csg
from timm_csg.explain import (
    cam,
    coarse_map,
    deconvnet,
    explain_prediction,
    filter_maps,
    grad_cam,
    guided_backprop,
    guided_grad_cam,
    normalise,
)

# The maps of the tiny net for its picture are u = 0, 2 and v = 2, 1 (top, bottom); class 0 weighs them 2 and -1.
BY_HAND = {cam: [[-2.0], [3.0]], grad_cam: [[0.0], [1.5]], coarse_map: [[0.0], [2.0]]}
MAPS = [grad_cam, coarse_map]


@pytest.mark.parametrize("method", BY_HAND, ids=lambda method: method.__name__)
def test_tiny_net_gives_the_hand_computed_map(tiny_net, picture, method):
    expected = torch.tensor(BY_HAND[method])[None]
    torch.testing.assert_close(method(tiny_net(), picture, 0, upsample=False), expected)
    torch.testing.assert_close(method(tiny_net(), picture, 0), expected.expand(1, 2, 2))  # twice as wide


def test_tiny_net_gives_the_hand_computed_guided_grad_cam(tiny_net, picture):
    # Guided backprop 0, 0 / 1, 0 times Grad-CAM 0, 0 / 1.5, 1.5.
    expected = torch.tensor([[[[0.0, 0.0], [1.5, 0.0]]]])
    torch.testing.assert_close(guided_grad_cam(tiny_net(), picture, 0), expected)


def maps_and_gradient(model, images, targets, layout):
    """The stage's maps and the gradient of the targets' logits to them, both NCHW, by autograd from the outside."""
    features = model.forward_features(images).detach().requires_grad_()
    logits = model.forward_head(features.clone())
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), features)
    if layout == "tokens":
        side = int((features.shape[1] - model.num_prefix_tokens) ** 0.5)
        grid = lambda t: t[:, model.num_prefix_tokens :].transpose(1, 2).reshape(len(t), -1, side, side)  # noqa: E731
    else:
        grid = (lambda t: t.permute(0, 3, 1, 2)) if layout == "NHWC" else (lambda t: t)
    return grid(features).detach(), grid(gradient)


LAYOUTS = {"test_resnet": "NCHW", "test_convnext": "NCHW", "test_mambaout": "NHWC", "test_vit": "tokens"}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
@pytest.mark.parametrize("method", MAPS, ids=lambda method: method.__name__)
def test_map_is_that_of_the_literal_loops_for_every_layout(make_model, images, targets, method, name, layout):
    model = make_model(name, **({"global_pool": "avg"} if layout == "tokens" else {}))
    maps, gradient = maps_and_gradient(model, images, targets, layout)
    found, large = (method(model, images, targets, upsample=choice) for choice in (False, True))
    for image in range(len(images)):
        expected = getattr(reference, method.__name__)(maps[image].tolist(), gradient[image].tolist())
        torch.testing.assert_close(found[image], torch.tensor(expected), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            large[image], torch.tensor(reference.upsampled(expected, 64, 64)), rtol=1e-4, atol=1e-6
        )


def test_cam_is_that_of_the_literal_loops(tiny_model, images, targets):
    maps = tiny_model.forward_features(images).detach()
    found = cam(tiny_model, images, targets, upsample=False)
    for image, target in enumerate(targets):
        expected = reference.cam(maps[image].tolist(), tiny_model.fc.weight[target].tolist())
        torch.testing.assert_close(found[image], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_mean_of_cam_plus_bias_is_the_logit(tiny_model, images, targets):
    found = cam(tiny_model, images, targets, upsample=False).mean(dim=(1, 2)) + tiny_model.fc.bias[targets]
    torch.testing.assert_close(found, tiny_model(images).gather(1, targets[:, None]).squeeze(1))


def test_grad_cam_is_the_positive_part_of_cam_over_the_number_of_positions(tiny_model, images, targets):
    expected = F.relu(cam(tiny_model, images, targets, upsample=False)) / 4
    torch.testing.assert_close(grad_cam(tiny_model, images, targets, upsample=False), expected)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout"])
def test_cam_refuses_heads_with_more_than_pooling_and_a_linear_layer(make_model, images, name):
    with pytest.raises(ValueError, match=r"CAM needs a head that is pooling → linear.*use explain.grad_cam"):
        cam(make_model(name), images)


@pytest.mark.parametrize("method", [cam, *MAPS], ids=lambda method: method.__name__)
def test_class_token_pooling_is_refused_with_the_variant_that_works(make_model, images, method):
    with pytest.raises(ValueError, match=r"reads only the class token.*global_pool='avg'"):
        method(make_model("test_vit", global_pool="token"), images)
    assert method(make_model("test_vit", global_pool="avg", fc_norm=False), images).any()


def test_zero_classifier_gives_empty_maps_and_no_wrong_refusal(make_model, images):
    model = make_model("test_vit", global_pool="avg")
    nn.init.zeros_(model.head.weight)
    assert not grad_cam(model, images).any()


def test_cam_of_an_average_pooled_vit_sees_the_patches(make_model, images):
    model = make_model("test_vit", global_pool="avg", fc_norm=False)
    expected = F.relu(cam(model, images, upsample=False)) / 16
    torch.testing.assert_close(grad_cam(model, images, upsample=False), expected)


def test_tokens_without_a_grid_are_refused(make_model, images, monkeypatch):
    model = make_model("test_vit", global_pool="avg")
    whole = model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda images: whole(images)[:, :7])
    with pytest.raises(ValueError, match=r"\[3, 7, \d+\] and do not form a grid.*explain.gradient"):
        grad_cam(model, images)


def test_grid_follows_images_of_another_size(make_model):
    model = timm.create_model("test_vit", num_classes=5, global_pool="avg", dynamic_img_size=True).eval()
    assert grad_cam(model, torch.rand(1, 3, 96, 64), upsample=False).shape == (1, 6, 4)
    assert grad_cam(make_model(), torch.rand(1, 3, 96, 64), upsample=False).shape == (1, 3, 2)


@pytest.mark.parametrize("method", MAPS, ids=lambda method: method.__name__)
def test_gated_path_weighs_maps_by_the_gate_of_the_class(tiny_model, images, targets, gated, method):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    maps, gradient = maps_and_gradient(model, images, targets, "NCHW")
    gradient = gradient * model.mechanism.gate.detach()[targets][:, :, None, None]
    found = method(model, images, targets, upsample=False, path="gated")
    for image in range(len(images)):
        expected = getattr(reference, method.__name__)(maps[image].tolist(), gradient[image].tolist())
        torch.testing.assert_close(found[image], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_assigned_filters_need_no_label_and_explain_their_own_logit(tiny_model, images, gated):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="assigned"))
    target, own = model(images).argmax(1), model.mechanism.class_filter_matrix()
    scale = model.mechanism.scale.detach() / (model.mechanism.variance + 1e-6).sqrt()
    weight = (own / own.sum(dim=1, keepdim=True) * scale)[target]
    expected = torch.einsum("bfhw,bf->bhw", model.forward_features(images).detach(), weight) / 4
    torch.testing.assert_close(grad_cam(model, images, upsample=False, path="gated"), F.relu(expected))


def test_standard_path_ignores_the_gate(tiny_model, images, gated):
    plain = grad_cam(tiny_model, images), cam(tiny_model, images)
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    assert all(torch.equal(*pair) for pair in zip(plain, (grad_cam(model, images), cam(model, images)), strict=True))


def test_gated_path_of_a_plain_model_is_refused(tiny_model, images):
    with pytest.raises(ValueError, match="has no gated path; differentiate"):
        grad_cam(tiny_model, images, path="gated")
    with pytest.raises(ValueError, match="path must be one of 'standard', 'gated'"):
        grad_cam(tiny_model, images, path="other")


def test_guided_grad_cam_is_the_product_of_its_parts(tiny_model, images, targets):
    expected = guided_backprop(tiny_model, images, targets) * grad_cam(tiny_model, images, targets)[:, None]
    torch.testing.assert_close(guided_grad_cam(tiny_model, images, targets), expected, rtol=1e-4, atol=1e-8)


def test_maps_without_evidence_are_flagged_and_stay_zero():
    maps = torch.tensor([[[-1.0, 4.0]], [[-1.0, 0.0]], [[float("nan"), 0.0]]])
    found = normalise(maps)
    assert found.empty.tolist() == [False, True, True]
    assert found.maps.tolist() == [[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]


def test_map_of_a_class_nothing_speaks_for_is_empty(tiny_net, picture):
    net = tiny_net()
    with torch.no_grad():
        net.fc.weight.neg_()[0, 1] = -1.0  # class 0: -2 u - v
    assert normalise(grad_cam(net, picture, 0)).empty.all()
    assert deconvnet(net, picture, 0).abs().sum() == 0


def test_maps_of_icnn_are_the_masked_ones(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, mechanism="icnn")
    with torch.no_grad():
        maps = model.mechanism(model.forward_features(images))
    assert not torch.equal(maps, model.forward_features(images))
    assert torch.equal(filter_maps(model, images, upsample=False), maps)
    expected = torch.einsum("bfhw,bf->bhw", maps, model.fc.weight[targets])
    torch.testing.assert_close(cam(model, images, targets, upsample=False), expected.detach())
    for path in ("standard", "gated"):
        found = grad_cam(model, images, targets, upsample=False, path=path)
        torch.testing.assert_close(found, F.relu(expected.detach()) / 4)
    why = explain_prediction(model, images, targets)[0]
    assert why.standard.logit == pytest.approx(model(images)[0, targets[0]].item(), rel=1e-5)


def test_mask_and_gate_of_a_chain_both_show(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, mechanism=["icnn", "csg"])
    gate = model.mechanism.members[1].gate
    nn.init.uniform_(gate, 0.1, 1)
    with torch.no_grad():
        maps = model.mechanism.members[0](model.forward_features(images))
        expected = torch.einsum("bfhw,bf->bhw", maps, (model.fc.weight * gate)[targets])
        logits = model(images, targets, paths=("gated",)).gated.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(expected.mean(dim=(1, 2)) + model.fc.bias[targets], logits)
    found = grad_cam(model, images, targets, upsample=False, path="gated")
    torch.testing.assert_close(found, F.relu(expected.detach()) / 4)
