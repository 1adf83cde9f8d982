"""The same numbers as captum and pytorch-grad-cam where those apply, and how they differ where they do not."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_csg import explain

captum = pytest.importorskip("captum.attr", reason="captum is not installed: pip install -e '.[compare]'")
pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: see the extra 'compare'")
pytestmark = pytest.mark.filterwarnings("ignore")
# Model -> the module that outputs the stage, which these packages have to be told.
SMALL = {"test_resnet": "layer4", "test_byobnet": "final_conv", "test_convnext": "stages"}
LARGE = {"resnet18": "layer4", "densenet121": "features", "convnext_atto": "stages"}
WITHOUT_RELU = ("test_convnext", "convnext_atto")
MODELS = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


@pytest.fixture(params=MODELS)
def case(request, make_model):
    name = request.param
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    model = make_model(name)
    # The classes with the largest mean over the map, so that no map is empty.
    classes = explain.coarse_map(model, images, upsample=False)
    assert classes.amax() > 0
    return name, model, model.get_submodule({**SMALL, **LARGE}[name]), images, model(images).argmax(1)


def assert_same(found, expected):
    """Equal up to rounding, relative to the largest value."""
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradient_is_captums_saliency(case):
    _, model, _, images, targets = case
    assert_same(explain.gradient(model, images, targets), captum.Saliency(model).attribute(images, targets, abs=False))


def test_grad_cam_is_captums(case):
    _, model, layer, images, targets = case
    expected = captum.LayerGradCam(model, layer).attribute(images, targets, relu_attributions=True)
    assert_same(explain.grad_cam(model, images, targets, upsample=False), expected[:, 0].detach())


def test_grad_cam_is_that_of_pytorch_grad_cam_after_its_rescaling(case):
    _, model, layer, images, targets = case
    wanted = [pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(int(target)) for target in targets]
    with pytorch_grad_cam.GradCAM(model=model, target_layers=[layer]) as theirs:
        expected = torch.from_numpy(theirs(input_tensor=images, targets=wanted))
    found = explain.grad_cam(model, images, targets)
    found = found - found.amin(dim=(1, 2), keepdim=True)
    assert_same(found / (found.amax(dim=(1, 2), keepdim=True) + 1e-7), expected)


def test_contributions_are_captums_gradient_times_activation(case):
    _, model, layer, images, targets = case
    expected = captum.LayerGradientXActivation(model, layer).attribute(images, targets).sum(dim=(2, 3))
    found = explain.class_filters(model, images, targets, top=expected.shape[1])
    assert_same(found.contribution, expected.gather(1, found.filters).detach())


@pytest.mark.parametrize(
    ("method", "theirs"),
    [(explain.deconvnet, "Deconvolution"), (explain.guided_backprop, "GuidedBackprop")],
    ids=["deconvnet", "guided_backprop"],
)
def test_relu_rules_are_captums_or_refused(case, method, theirs):
    name, model, _, images, targets = case
    expected = getattr(captum, theirs)(model).attribute(images, targets)
    if name in WITHOUT_RELU:
        # Captum finds nothing to change and returns the plain gradient.
        assert_same(explain.gradient(model, images, targets), expected)
        with pytest.raises(ValueError, match="rule for ReLUs"):
            method(model, images, targets)
    else:
        assert_same(method(model, images, targets), expected)


def test_guided_backprop_is_that_of_pytorch_grad_cam(case):
    name, model, _, images, targets = case
    if name in WITHOUT_RELU:
        pytest.skip("no ReLU")
    theirs = pytorch_grad_cam.GuidedBackpropReLUModel(copy.deepcopy(model))
    pairs = zip(images.split(1), targets.tolist(), strict=True)
    expected = torch.stack([torch.from_numpy(theirs(image.clone(), target).copy()) for image, target in pairs])
    assert_same(explain.guided_backprop(model, images, targets), expected.permute(0, 3, 1, 2))


def test_guided_grad_cam_is_captums_with_bilinear_maps(case):
    name, model, layer, images, targets = case
    if name in WITHOUT_RELU:
        pytest.skip("no ReLU")
    expected = captum.GuidedGradCam(model, layer).attribute(images, targets, interpolate_mode="bilinear")
    assert_same(explain.guided_grad_cam(model, images, targets), expected)


@pytest.mark.parametrize("relu", ["functional", "relu6"])
def test_captum_misses_relus_that_are_no_relu_modules(tiny_net, picture, relu):
    net = tiny_net(relu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.GuidedBackprop(net).attribute(picture, 0)
    torch.testing.assert_close(theirs, explain.gradient(net, picture, 0))  # the plain gradient, silently
    assert not torch.equal(theirs, explain.guided_backprop(net, picture, 0))


@pytest.mark.slow
def test_captum_misses_the_relu6_of_a_mobilenet():
    torch.manual_seed(0)
    model, images = timm.create_model("mobilenetv2_035", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    theirs = captum.GuidedBackprop(model).attribute(images, 0)
    torch.testing.assert_close(theirs, explain.gradient(model, images, 0))
    assert F.cosine_similarity(theirs.flatten(), explain.guided_backprop(model, images, 0).flatten(), dim=0) < 0.9
