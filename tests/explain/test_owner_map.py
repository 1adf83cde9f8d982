"""Maps of a class's own filters: by hand, literal loops, the rule of their sum, tokens, and refusals."""

import pytest
import torch
from reference import explain as reference

import timm_csg
from timm_csg.explain import owner_map


@pytest.fixture
def two_owners(tiny_net):
    """The tiny net, whose filter 0 belongs to class 0 and filter 1 to class 1, with a masked classifier."""
    model = timm_csg.differentiate(tiny_net(), mechanism="assigned")
    model.mechanism.assign_(torch.eye(2, dtype=torch.bool), torch.tensor([0.5, 1.0]), torch.tensor([4.0, 9.0]))
    model.project_()
    return model


def test_tiny_net_gives_the_hand_computed_map(two_owners, picture):
    # The maps are u = 0, 2 and v = 2, 1 (top, bottom); class 0 owns u and weighs it 2, class 1 owns v and weighs it 3.
    assert owner_map(two_owners, picture, 0, upsample=False).tolist() == [[[0.0], [2.0]]]
    assert owner_map(two_owners, picture, 1, upsample=False).tolist() == [[[3.0], [1.5]]]
    assert owner_map(two_owners, picture, 1).tolist() == [[[3.0, 3.0], [1.5, 1.5]]]


def test_gated_path_weighs_by_scale_and_deviation(two_owners, picture):
    found = owner_map(two_owners, picture, 1, upsample=False, path="gated")
    torch.testing.assert_close(found, torch.tensor([[[2.0], [1.0]]]) / 2 / 3)


@pytest.mark.parametrize("mechanism", ["csg", "assigned", "icnn"])
def test_map_is_that_of_the_literal_loop_and_sums_to_the_evidence(tiny_model, images, targets, gated, mechanism):
    model = timm_csg.differentiate(tiny_model, mechanism=mechanism)
    if mechanism == "icnn":
        model.mechanism.category.copy_(torch.arange(96) % 5)
        model.mechanism.batches.fill_(1)
    else:
        gated(model)
    owned = timm_csg.metrics.owned_filters(model.mechanism.class_filter_matrix())[targets]
    with torch.no_grad():
        maps = model.forward_features(images)
        maps = model.mechanism(maps) if mechanism == "icnn" else maps
        weight = model.fc.weight[targets]
    found = owner_map(model, images, targets, upsample=False)
    for image in range(len(images)):
        gradient = (weight[image] / 4)[:, None, None].expand(-1, 2, 2)
        expected = reference.owner_map(maps[image].tolist(), gradient.tolist(), owned[image].tolist())
        torch.testing.assert_close(found[image], torch.tensor(expected), rtol=1e-4, atol=1e-6)
    evidence = (weight * owned * maps.mean(dim=(2, 3))).sum(dim=1)
    torch.testing.assert_close(found.sum(dim=(1, 2)), evidence)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_sum_and_bias_are_the_logit_where_the_classifier_is_masked(make_model, images, targets, gated, name):
    model = make_model(name, **({"global_pool": "avg", "fc_norm": False} if name == "test_vit" else {}))
    model = gated(timm_csg.differentiate(model, mechanism="assigned"))
    model.project_()
    found = owner_map(model, images, targets, upsample=False).sum(dim=(1, 2)) + model.get_classifier().bias[targets]
    torch.testing.assert_close(found, model(images).detach().gather(1, targets[:, None])[:, 0])


def test_class_token_allows_no_map_on_either_path(make_model, images, gated):
    model = gated(timm_csg.differentiate(make_model("test_vit", global_pool="token"), mechanism="assigned"))
    for path in ("standard", "gated"):
        with pytest.raises(ValueError, match=r"reads only the class token.*global_pool='avg'"):
            owner_map(model, images, 1, path=path)


def test_gated_path_of_an_average_pooled_vit_gives_every_patch_its_part(make_model, images, gated):
    model = gated(timm_csg.differentiate(make_model("test_vit", global_pool="avg"), mechanism="assigned"))
    found = owner_map(model, images, 1, upsample=False, path="gated")
    own, mechanism = model.mechanism.owned[1].bool(), model.mechanism
    weight = (own / own.sum() * mechanism.scale / (mechanism.variance + 1e-6).sqrt()).detach()
    tokens = model.forward_features(images).detach()
    expected = (tokens[:, 1:] @ weight / tokens.shape[1]).unflatten(1, (4, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_every_layout_has_a_map_of_its_images(any_model, images, gated):
    if getattr(any_model, "global_pool", "avg") == "token":
        any_model.reset_classifier(5, "avg")
    model = gated(timm_csg.differentiate(any_model, mechanism="assigned"))
    assert owner_map(model, images, path="gated").shape == (3, 64, 64)


def test_filters_without_owners_are_refused(tiny_model, images):
    with pytest.raises(ValueError, match=r"no owners, because it is plain; differentiate\(\).*explain.grad_cam"):
        owner_map(tiny_model, images)
    with pytest.raises(ValueError, match="only after a training step"):
        owner_map(timm_csg.differentiate(tiny_model, mechanism="icnn"), images)
