"""Every map that judge_maps.py judges: ours, captum's, torch-cam's, pytorch-grad-cam's, and what knows nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F

from timm_csg import explain, is_differentiated, judging

LAYERS = {
    "ResNet": "layer3",
    "CifarResNet": "layer3",
    "EfficientNet": "bn2",
}  # the last maps, which other packages ask for


def last_layer(model: nn.Module) -> str:
    """Name of the module that makes the last maps."""
    return next(LAYERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in LAYERS)


def strongest_colour(method, model, images, targets):
    """Largest absolute value over colours, the usual map of a gradient."""
    return method(model, images, targets).abs().amax(dim=1)


def captum_pixels(name, options, model, images, targets):
    """Signed attributions of captum, colours added up."""
    return getattr(captum.attr, name)(model).attribute(images, target=targets, **options).sum(dim=1)


def captum_layer(model, images, targets):
    """Captum's Grad-CAM, up-sampled."""
    layer = model.get_submodule(last_layer(model))
    found = captum.attr.LayerGradCam(model, layer).attribute(images, targets, relu_attributions=True)
    return F.interpolate(found.detach(), images.shape[-2:], mode="bilinear")[:, 0]


def torch_cam(name, model, images, targets):
    """One of torch-cam's, up-sampled."""
    with getattr(torchcam.methods, name)(model, last_layer(model), input_shape=tuple(images.shape[1:])) as extractor:
        found = extractor(targets.tolist(), model(images))[0]
    return F.interpolate(found[:, None].detach(), images.shape[-2:], mode="bilinear")[:, 0]


def grad_cam_package(name, model, images, targets):
    """One of pytorch-grad-cam's, which scales each map to [0, 1]."""
    wanted = [ClassifierOutputTarget(int(target)) for target in targets]
    layer = model.get_submodule(last_layer(model))
    with getattr(pytorch_grad_cam, name)(model=model, target_layers=[layer]) as method:
        return torch.from_numpy(method(input_tensor=images, targets=wanted))


MAKERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "evidence map": explain.evidence_map,
    "owner map": partial(explain.owner_map, path="gated"),
    "CAM": explain.cam,
    "Grad-CAM": explain.grad_cam,
    "coarse map": explain.coarse_map,
    "gradient": partial(strongest_colour, explain.gradient),
    "deconvnet": partial(strongest_colour, explain.deconvnet),
    "guided backprop": partial(strongest_colour, explain.guided_backprop),
    "Guided Grad-CAM": partial(strongest_colour, explain.guided_grad_cam),
    "guided evidence map": partial(strongest_colour, explain.guided_evidence_map),
    "captum Grad-CAM": captum_layer,
    "captum InputXGradient": partial(captum_pixels, "InputXGradient", {}),
    "captum IntegratedGradients": partial(
        captum_pixels, "IntegratedGradients", {"n_steps": 8, "internal_batch_size": 32}
    ),
    "torch-cam LayerCAM": partial(torch_cam, "LayerCAM"),
    "torch-cam GradCAMpp": partial(torch_cam, "GradCAMpp"),
    "grad-cam HiResCAM": partial(grad_cam_package, "HiResCAM"),
    "grad-cam XGradCAM": partial(grad_cam_package, "XGradCAM"),
    "grad-cam EigenCAM": partial(grad_cam_package, "EigenCAM"),
}
BASELINES = {"edges": judging.edge_map, "centre": judging.centre_map, "noise": judging.noise_map}
"""Maps that know nothing of the model."""
MAKERS |= BASELINES


def makers_for(model: nn.Module, names: list[str] | None = None) -> dict[str, Callable]:
    """Those that exist for the model: three need owners."""
    missing = set() if is_differentiated(model) else {"evidence map", "owner map", "guided evidence map"}
    return {name: MAKERS[name] for name in names or MAKERS if name not in missing}
