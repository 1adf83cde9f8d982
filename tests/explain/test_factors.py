"""Factor activation maps: hand-computed values, a literal loop, and an encoder left as it was."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from timm_csg.explain.factors import factor_activation_map, factor_maps


class TinyEncoder(nn.Module):
    """Two convs, then mean and log-variance of four factors."""

    def __init__(self, *, variance=True):
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3)
        )
        self.mean, self.log_variance = nn.Linear(8 * 36, 4), nn.Linear(8 * 36, 4)
        self.variance = variance

    def forward(self, images):
        flat = F.relu(self.maps(images), inplace=True).flatten(1)
        return (self.mean(flat), self.log_variance(flat)) if self.variance else self.mean(flat)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TinyEncoder().train()


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def literal(encoder, pictures, factor, target, weights, rectify):
    """One factor, one image, one filter, one position at a time."""
    result = torch.zeros(len(pictures), 6, 6)
    for index, picture in enumerate(pictures):
        maps = encoder.maps(picture[None]).detach().requires_grad_()
        flat = maps.relu().flatten(1)
        mean, log_variance = encoder.mean(flat)[0, factor], encoder.log_variance(flat)[0, factor]
        score = mean if target == "mean" else 0.5 * (mean**2 + log_variance.exp() - log_variance - 1)
        (gradient,) = torch.autograd.grad(score, maps)
        alpha = gradient[0].clone()
        if weights == "mean":
            for filter_ in range(8):
                alpha[filter_] = gradient[0, filter_].sum() / 36
        for row in range(6):
            for column in range(6):
                evidence = [
                    float((alpha[filter_, row, column] * maps[0, filter_, row, column]).detach())
                    for filter_ in range(8)
                ]
                value = {
                    "sum": max(sum(evidence), 0),
                    "each": sum(max(part, 0) for part in evidence),
                    "absolute": abs(sum(evidence)),
                }[rectify]
                result[index, row, column] = value
    return result


@pytest.mark.parametrize("target", ["mean", "kl"])
@pytest.mark.parametrize("weights", ["mean", "position"])
@pytest.mark.parametrize("rectify", ["sum", "each", "absolute"])
def test_single_maps_are_those_of_the_literal_loop(encoder, pictures, target, weights, rectify):
    encoder.eval()
    options = {"target": target, "weights": weights, "rectify": rectify}
    found = factor_maps(encoder, pictures, [0, 3], layer=encoder.maps, upsample=False, **options)
    expected = [literal(encoder, pictures, factor, **options) for factor in (0, 3)]
    torch.testing.assert_close(found, torch.stack(expected, dim=1))


def test_position_weights_of_a_flattening_encoder_add_up_to_the_factor():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    pictures = torch.rand(2, 3, 8, 8)
    parts = [encoder[2].weight[1].view(4, 6, 6) * encoder[0](picture) for picture in pictures]
    torch.testing.assert_close(sum(parts[0].flatten()) + encoder[2].bias[1], encoder(pictures)[0, 1])
    found = factor_maps(encoder, pictures, 1, weights="position", upsample=False)[:, 0]
    torch.testing.assert_close(found, torch.stack([part.sum(dim=0).relu() for part in parts]).detach())


def test_joint_map_is_the_mean_of_the_single_maps_and_not_that_of_the_sum(encoder, pictures):
    single = factor_maps(encoder, pictures)
    assert single.shape == (2, 4, 16, 16)
    torch.testing.assert_close(factor_activation_map(encoder, pictures), single.mean(dim=1))
    torch.testing.assert_close(factor_activation_map(encoder, pictures, [1, 2]), single[:, 1:3].mean(dim=1))
    assert not torch.allclose(factor_activation_map(encoder, pictures, joint="sum"), single.mean(dim=1))


def test_opposite_factors_cancel_in_the_sum_and_not_in_the_mean():
    class Opposite(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.Identity()

        def forward(self, images):
            value = self.maps(images).mean(dim=(1, 2, 3))
            return torch.stack([value, -value], dim=1)

    picture = torch.tensor([[[[1.0, -3.0]]]])
    assert factor_activation_map(Opposite(), picture, joint="sum").abs().max() == 0
    # d value / d map = 1/2 everywhere: the first factor's map is relu([.5, -1.5]), the second's relu([-.5, 1.5])
    torch.testing.assert_close(factor_maps(Opposite(), picture), torch.tensor([[[[0.5, 0.0]], [[0.0, 1.5]]]]))
    torch.testing.assert_close(factor_activation_map(Opposite(), picture), torch.tensor([[[0.25, 0.75]]]))


def test_without_a_variance_the_distribution_loss_is_half_the_square(pictures):
    torch.manual_seed(0)
    encoder = TinyEncoder(variance=False).eval()
    mean = encoder(pictures)
    found = factor_maps(encoder, pictures, target="kl", rectify="absolute", upsample=False)
    by_mean = factor_maps(encoder, pictures, rectify="absolute", upsample=False)
    torch.testing.assert_close(found, by_mean * mean.abs()[:, :, None, None].detach())  # d mean²/2 = mean d mean


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout"])
def test_timm_embedding_models_are_explained_at_their_last_stage(name, images):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    maps = factor_maps(model, images, [0, 1], upsample=False)
    features = model.eval().forward_features(images)
    grid = features.shape[1:3] if name == "test_mambaout" else features.shape[2:]
    assert maps.shape == (3, 2, *grid)
    assert factor_activation_map(model, images).shape == (3, *images.shape[2:])


def test_factor_of_a_pooling_network_is_its_own_filter(images):
    model = timm.create_model("test_resnet", num_classes=0).eval()
    features = model.forward_features(images)
    expected = features[:, 5].relu() / features[0, 0].numel()  # pool → nothing: alpha is 1 / positions for filter 5
    torch.testing.assert_close(factor_maps(model, images, 5, upsample=False)[:, 0], expected)


def test_encoder_is_left_as_found(encoder, pictures):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.maps[1].eval()
    with torch.no_grad():
        factor_activation_map(encoder, pictures)
    with torch.inference_mode():
        inside = pictures * 1
        factor_maps(encoder, inside, 0)
    assert encoder.training
    assert not encoder.maps[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(module._forward_hooks for module in encoder.modules())
    assert pictures.grad is None


def test_hooks_are_removed_when_the_encoder_fails(encoder):
    with pytest.raises(RuntimeError):
        factor_maps(encoder, torch.rand(1, 3, 9, 9), layer=encoder.maps)
    assert not any(module._forward_hooks for module in encoder.modules())


@pytest.mark.parametrize(
    ("factors", "shown"), [(4, "0 to 3"), ([0, -1], "0 to 3"), ([], "one or more"), (["a"], "'a'")]
)
def test_factors_that_do_not_exist_are_named(encoder, pictures, factors, shown):
    with pytest.raises(ValueError, match=shown):
        factor_maps(encoder, pictures, factors)


def test_wrong_input_says_what_to_do(encoder, pictures):
    with pytest.raises(TypeError, match=r"pair \(mean, log-variance\).*returned a tensor of shape \[2, 8, 6, 6\]"):
        factor_maps(encoder.maps, pictures)
    with pytest.raises(ValueError, match="was not used by"):
        factor_maps(encoder, pictures, layer=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="layer must output maps"):
        factor_maps(encoder, pictures, layer=encoder.mean)
    with pytest.raises(ValueError, match="images must be"):
        factor_maps(encoder, pictures[0])
    with pytest.raises(ValueError, match="target must be one of"):
        factor_maps(encoder, pictures, target="sample")
    with pytest.raises(ValueError, match="no module of the encoder outputs maps"):
        factor_maps(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), pictures)
    with pytest.raises(ValueError, match=r"does not return a map .* from forward_features"):
        factor_maps(timm.create_model("test_vit", num_classes=0, img_size=16), pictures)
