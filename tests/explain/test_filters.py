"""Filter maps, strongest filters of a class, strongest images of a filter, patches: by hand and by slow loops."""

import pytest
import torch
from reference import explain as reference

import timm_csg
from timm_csg.explain import class_filters, filter_maps, patches, strongest_images


def test_filter_maps_are_the_stage_output_in_every_layout(any_model, images):
    features = any_model.forward_features(images).detach()
    found = filter_maps(any_model, images, upsample=False)
    if features.ndim == 3:
        features = features[:, any_model.num_prefix_tokens :].transpose(1, 2)
    elif getattr(any_model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    assert torch.equal(found.flatten(2), features.flatten(2))


def test_filter_maps_are_chosen_and_upsampled(tiny_model, images):
    small, large = filter_maps(tiny_model, images, [7, 2], upsample=False), filter_maps(tiny_model, images, [7, 2])
    assert torch.equal(small, filter_maps(tiny_model, images, upsample=False)[:, [7, 2]])
    expected = torch.tensor([[reference.upsampled(plane.tolist(), 64, 64) for plane in image] for image in small])
    torch.testing.assert_close(large, expected, rtol=1e-4, atol=1e-6)


def test_class_filters_of_the_tiny_net_by_hand(tiny_net, picture):
    # Pooled u = 1, v = 1.5; class 0 weighs them 2 and -1, class 1 -1 and 3; biases are not contributions.
    found = class_filters(tiny_net(), picture, 0, top=2)
    assert found.filters.tolist() == [[0, 1]]
    assert found.contribution.tolist() == [[2.0, -1.5]]
    assert found.share.tolist() == [[1.0, -0.75]]
    assert found.exact
    assert class_filters(tiny_net(), picture, 1, top=1).contribution.tolist() == [[4.5]]


def test_contributions_and_bias_sum_to_the_logit(tiny_model, images, targets):
    found = class_filters(tiny_model, images, targets, top=96)
    logits = tiny_model(images).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.contribution.sum(1) + tiny_model.fc.bias[targets], logits)
    torch.testing.assert_close(found.share.clamp(min=0).sum(1), torch.ones(3))


def test_other_heads_say_that_contributions_are_estimates(make_model, images, targets):
    model = make_model("test_convnext")
    features = model.forward_features(images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(features).gather(1, targets[:, None]).sum(), features)
    found = class_filters(model, images, targets, top=64)
    expected = (gradient * features).sum(dim=(2, 3)).detach()
    torch.testing.assert_close(found.contribution, expected.gather(1, found.filters), rtol=1e-4, atol=1e-6)
    assert not found.exact


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_gated_contributions_of_assigned_filters_sum_to_the_gated_logit(make_model, images, gated, name):
    model = gated(timm_csg.differentiate(make_model(name), mechanism="assigned"))
    found = class_filters(model, images, top=model.num_features, path="gated")
    gated_logits = model(images, paths=("gated",)).gated.gather(1, found.targets[:, None]).squeeze(1)
    mechanism = model.mechanism
    own = mechanism.class_filter_matrix() / mechanism.class_filter_matrix().sum(dim=1, keepdim=True)
    at_mean = mechanism.scale * mechanism.mean / (mechanism.variance + 1e-6).sqrt()  # what standardising takes away
    constant = mechanism.bias - own @ at_mean
    torch.testing.assert_close(found.contribution.sum(1) + constant[found.targets], gated_logits)
    assert found.exact


def test_class_filters_need_no_grid(make_model, images):
    assert class_filters(make_model("test_vit", global_pool="token"), images, top=3).exact


def test_nothing_for_a_class_means_no_share(tiny_net, picture):
    net = tiny_net()
    with torch.no_grad():
        net.fc.weight.fill_(-1.0)
    assert class_filters(net, picture, 0, top=2).share.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("by", ["mean", "max"])
@pytest.mark.parametrize("batch", [1, 4, 11])
def test_strongest_images_are_those_of_a_slow_search(tiny_model, by, batch):
    pictures = torch.rand(11, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    maps = filter_maps(tiny_model, pictures, [5, 40], upsample=False)
    found = strongest_images(tiny_model, pictures.split(batch), [5, 40], top=4, by=by)
    for place, planes in enumerate(maps.unbind(dim=1)):
        values = [float(plane.max() if by == "max" else plane.mean()) for plane in planes]
        expected = reference.strongest(values, 4)
        assert found.indices[place].tolist() == expected
        torch.testing.assert_close(found.values[place], torch.tensor([values[i] for i in expected]))
        rows = [divmod(int(planes[i].flatten().argmax()), 2) for i in expected]
        assert found.positions[place].tolist() == [list(row) for row in rows]


def test_of_equal_images_the_first_comes_first(tiny_model, images):
    same = images[:1].expand(6, -1, -1, -1)
    found = strongest_images(tiny_model, same.split(4), [0, 1], top=3)
    assert found.indices.tolist() == [[0, 1, 2]] * 2


def test_fewer_images_than_asked_for_are_marked(tiny_model, images):
    found = strongest_images(tiny_model, [(images, torch.zeros(3))], [0], top=5)
    assert found.indices[0, 3:].tolist() == [-1, -1]
    assert found.values[0, 3:].isneginf().all()
    assert found.grid == (2, 2)


def test_strongest_images_keep_no_images(tiny_model):
    def loader():
        for _ in range(3):
            yield torch.rand(2, 3, 64, 64)

    found = strongest_images(tiny_model, loader(), top=2)
    assert sum(tensor.numel() for tensor in found[:3]) == 96 * 2 * 4


def test_patch_is_centred_on_the_cell_and_moved_inside():
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(3, -1, -1, -1)
    found = patches(image, torch.tensor([[0, 0], [1, 2], [3, 3]]), (4, 4), size=0.5)
    # Centres (1, 1), (3, 5), (7, 7) in pixels; squares of 4 start at 2 less, moved into the image.
    assert found[:, 0, 0, 0].tolist() == [0.0, 8.0 + 3.0, 32.0 + 4.0]
    assert found.shape == (3, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, images: filter_maps(model, images, [96]), "filters must be between 0 and 95"),
        (lambda model, images: filter_maps(model, images, []), "at least one filter"),
        (lambda model, images: class_filters(model, images, top=0), "top must be an integer from 1 to 96"),
        (lambda model, images: strongest_images(model, []), "the loader is empty"),
        (lambda model, images: strongest_images(model, [images], by="sum"), "by must be one of 'mean', 'max'"),
        (lambda model, images: strongest_images(model, [images], top=0), "top must be an integer of at least 1"),
        (lambda model, images: strongest_images(model, [images, images[..., :32]], [0]), "must have the same size"),
        (lambda model, images: patches(images, torch.zeros(3, 2), (2, 2), size=0), "size must be a fraction"),
        (lambda model, images: patches(images, torch.zeros(2, 2), (2, 2)), r"positions \[batch, 2\]"),
        (lambda model, images: patches(images, torch.full((3, 2), 2), (2, 2)), "must lie on the grid"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, images, call, says):
    with pytest.raises(ValueError, match=says):
        call(tiny_model, images)
