"""Why one class rather than another: by hand, against literal loops, sums that are exact, and what removal does."""

import pytest
import torch
from reference import explain as reference

import timm_csg
from timm_csg import metrics
from timm_csg.explain import contrast, owner_map
from timm_csg.explain.two_classes import deciding_filters


def test_tiny_net_is_contrasted_as_by_hand(tiny_net, picture):
    # Pooled u = 1, v = 1.5; weights 2, -1 and -1, 3; biases 0.25 and -9; maps u = 0, 2 and v = 2, 1 (top, bottom).
    found = contrast(tiny_net(), picture, 0, 1, top=2, upsample=False)
    assert found.contribution.tolist() == [[3.0, -6.0]]
    assert (found.difference.tolist(), found.constant.tolist()) == ([6.25], [9.25])
    assert (found.filters.tolist(), found.deciding.tolist()) == ([[1, 0]], [[True, False]])
    assert found.maps.tolist() == [[[[-4.0], [-2.0]], [[0.0], [3.0]]]]
    assert found.map.tolist() == [[[-4.0], [1.0]]]
    assert (found.exact, found.owner, found.classes) == (True, None, (0, 1))


def test_classes_change_sign_when_they_change_places(tiny_model, images):
    one, other = contrast(tiny_model, images, 1, 3), contrast(tiny_model, images, 3, 1)
    for name in ("difference", "contribution", "constant", "maps", "map"):
        torch.testing.assert_close(getattr(one, name), -getattr(other, name))
    assert torch.equal(one.deciding, other.deciding)


@pytest.mark.parametrize("mechanism", [None, "csg", "assigned", "icnn"])
@pytest.mark.parametrize("path", ["standard", "gated"])
def test_contributions_and_biases_sum_to_the_difference_of_linear_heads(tiny_model, images, gated, mechanism, path):
    model = tiny_model
    if mechanism is not None:
        timm_csg.differentiate(model, mechanism=mechanism)
    if mechanism in ("csg", "assigned"):
        gated(model)
    if mechanism is None and path == "gated":
        pytest.skip("plain models have no gated path")
    found = contrast(model, images, 4, 2, upsample=False, path=path)
    if path == "gated":
        labels = [torch.full((3,), label) for label in found.classes]
        logits = [model(images, label).detach()[:, label[0]] for label in labels]
    else:
        logits = [model(images).detach()[:, label] for label in found.classes]
    torch.testing.assert_close(found.difference, logits[0] - logits[1])
    torch.testing.assert_close(found.contribution.sum(dim=1) + found.constant, found.difference)
    torch.testing.assert_close(found.map.sum(dim=(1, 2)), found.contribution.sum(dim=1))
    assert found.exact
    if path == "standard":
        bias = model.fc.bias.detach()
        torch.testing.assert_close(found.constant, (bias[4] - bias[2]).expand(3), rtol=1e-4, atol=1e-5)


def test_contributions_are_those_of_the_literal_loop(tiny_model, images):
    found = contrast(tiny_model, images, 0, 3, top=96, upsample=False)
    maps, weight = tiny_model.forward_features(images).detach(), tiny_model.fc.weight.detach()
    for image in range(len(images)):
        for place, index in enumerate(found.filters[image].tolist()):
            plane = maps[image, index].tolist()
            expected = reference.cam([plane], [float(weight[0, index] - weight[3, index]) / 4])
            torch.testing.assert_close(found.maps[image, place], torch.tensor(expected), rtol=1e-4, atol=1e-6)
            assert float(found.contribution[image, index]) == pytest.approx(sum(map(sum, expected)), rel=1e-3, abs=1e-6)


def test_only_filters_of_the_two_classes_take_part_where_the_classifier_is_masked(tiny_model, images, gated):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="assigned"))
    model.project_()
    found = contrast(model, images, 0, 1, upsample=False)
    own = model.mechanism.owned[:2].bool()
    assert not found.contribution[:, ~own.any(dim=0)].any()
    torch.testing.assert_close(
        found.map, owner_map(model, images, 0, upsample=False) - owner_map(model, images, 1, upsample=False)
    )
    assert torch.equal(found.owner, metrics.owners(model.mechanism.class_filter_matrix()))


def test_without_the_deciding_filters_the_other_class_is_ahead_and_with_one_of_them_it_is_not(tiny_model, images):
    found = contrast(tiny_model, images, 2, 4)
    features, weight = tiny_model.forward_features(images).detach(), tiny_model.fc.weight.detach()
    pooled, sign = features.mean(dim=(2, 3)), found.difference.sign()

    def rest(kept):
        logits = (pooled * kept) @ weight.T + tiny_model.fc.bias.detach()
        return (logits[:, 2] - logits[:, 4]) * sign

    enough = (found.contribution * sign[:, None]).clamp(min=0).sum(dim=1) >= found.difference.abs()
    assert enough.any()
    assert (rest(~found.deciding)[enough] <= 1e-6).all()
    weakest = (found.contribution * sign[:, None]).masked_fill(~found.deciding, torch.inf).argmin(dim=1)
    fewer = found.deciding.scatter(1, weakest[:, None], False)
    assert (rest(~fewer)[enough] > 0).all()


def test_all_supporters_decide_where_they_are_not_enough():
    contribution = torch.tensor([[1.0, -5.0, 2.0], [0.0, 0.0, 0.0]])
    found = deciding_filters(contribution, torch.tensor([10.0, 3.0]))
    assert found.tolist() == [[True, False, True], [False, False, False]]
    assert deciding_filters(-contribution, torch.tensor([-10.0, 0.0])).tolist() == found.tolist()


def test_nonlinear_heads_are_estimated_and_every_layout_has_maps(any_model, images):
    if getattr(any_model, "global_pool", "avg") == "token":
        found = contrast(any_model, images, 0, 1)
        assert (found.maps, found.map, found.exact) == (None, None, True)
        any_model.reset_classifier(5, "avg")
    found = contrast(any_model, images, 0, 1, top=3)
    assert found.maps.shape == (3, 3, 64, 64)
    assert found.exact == (type(any_model).__name__ in ("ResNet", "VisionTransformer"))


def test_classes_are_named_or_numbered(tiny_model, images):
    tiny_model.pretrained_cfg["label_names"] = ["cat", "dog", "owl", "fox", "ox"]
    expected = contrast(tiny_model, images, 0, 3)
    assert torch.equal(contrast(tiny_model, images, "cat", "fox").contribution, expected.contribution)
    assert contrast(tiny_model, images, "0", torch.tensor(3)).classes == (0, 3)
    with pytest.raises(ValueError, match=r"no class 'dgo'\. Did you mean 'dog'"):
        contrast(tiny_model, images, "dgo", "cat")
    with pytest.raises(ValueError, match="no class '5'; the model has cat, dog"):
        contrast(tiny_model, images, 5, "cat")
    with pytest.raises(ValueError, match="both are 'cat'"):
        contrast(tiny_model, images, 0, "cat")
    with pytest.raises(ValueError, match="top must be"):
        contrast(tiny_model, images, 0, 1, top=97)
