"""The same numbers as Quantus where a judge is also there; maps of captum, torch-cam and pytorch-grad-cam judged."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_csg import explain, judging

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def quantus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("quantus", reason="quantus is not installed: pip install quantus")


@pytest.fixture
def maps(tiny_model, images, targets):
    return explain.coarse_map(tiny_model, images, targets) + 1e-3 * torch.rand(3, 64, 64)


@pytest.fixture
def masks():
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[:, 10:50, 5:40] = True
    return masks


def with_quantus(metric, model, images, targets, maps, **given):
    """A metric's values for these pictures."""
    return metric(
        model=model,
        x_batch=images.numpy(),
        y_batch=targets.numpy(),
        a_batch=maps.detach().numpy()[:, None],
        device="cpu",
        channel_first=True,
        **given,
    )


def test_pointing_game_is_that_of_quantus(quantus, tiny_model, images, targets, maps, masks):
    metric = quantus.PointingGame(abs=False, normalise=False, disable_warnings=True)
    expected = with_quantus(metric, tiny_model, images, targets, maps, s_batch=masks.numpy()[:, None])
    assert judging.pointing_game(maps, masks).values.tolist() == [float(hit) for hit in expected]


def test_energy_inside_is_the_relevance_mass_of_quantus(quantus, tiny_model, images, targets, maps, masks):
    metric = quantus.RelevanceMassAccuracy(abs=False, normalise=False, disable_warnings=True)
    expected = with_quantus(metric, tiny_model, images, targets, maps.clamp(min=0), s_batch=masks.numpy()[:, None])
    np.testing.assert_allclose(judging.energy_inside(maps, masks).values.numpy(), expected, rtol=1e-4)


def test_deletion_is_the_pixel_flipping_of_quantus(quantus, make_model, images, targets):
    model, grey = make_model(in_chans=1), images[:, :1]
    maps = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    metric = quantus.PixelFlipping(
        features_in_step=64 * 64 // 8,
        perturb_baseline=0.0,
        abs=False,
        normalise=False,
        disable_warnings=True,
    )
    expected = np.array(with_quantus(metric, model, grey, targets, maps, softmax=True))
    found = judging.probability_curve(model, grey, targets, maps, steps=8)
    np.testing.assert_allclose(found[:, 1:].numpy(), expected, rtol=1e-3, atol=1e-5)


def test_similarity_is_that_of_quantus(quantus, maps):
    expected = quantus.similarity_func.correlation_spearman(
        maps.flatten(1).numpy(), maps.flip(0).flatten(1).numpy(), batched=True
    )
    np.testing.assert_allclose(judging.map_similarity(maps, maps.flip(0)).numpy(), expected, rtol=1e-4)


def captum_map(model, images, targets):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed: pip install captum")
    return captum.InputXGradient(model).attribute(images.requires_grad_(), target=targets).sum(dim=1)


def torch_cam_map(model, images, targets):
    torchcam = pytest.importorskip("torchcam.methods", reason="torch-cam is not installed: pip install torchcam")
    with torchcam.LayerCAM(model, "layer4") as extractor:
        found = extractor(targets.tolist(), model(images.requires_grad_()))[0]
    return F.interpolate(found[:, None], images.shape[-2:], mode="bilinear")[:, 0]


def grad_cam_map(model, images, targets):
    package = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: pip install grad-cam")
    wanted = [package.utils.model_targets.ClassifierOutputTarget(int(target)) for target in targets]
    with package.HiResCAM(model=model, target_layers=[model.layer4]) as method:
        return method(input_tensor=images, targets=wanted)


@pytest.mark.parametrize("made", [captum_map, torch_cam_map, grad_cam_map])
def test_maps_of_other_packages_can_be_judged_and_leave_nothing(made, tiny_model, images, targets):
    hooks = sum(len(module._forward_hooks) for module in tiny_model.modules())
    found = judging.judge(made, tiny_model, images, targets, objects=torch.tensor([[9.0, 9.0, 40.0, 40.0]] * 3))
    assert all(np.isfinite(one.score) and np.isfinite(one.chance) for one in found.values())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert sum(len(module._forward_hooks) for module in tiny_model.modules()) == hooks
