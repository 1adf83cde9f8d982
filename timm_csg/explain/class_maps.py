"""Maps of the evidence for a class on the last stage's grid: by its own filters, CAM, Grad-CAM and relatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.explain._grid import to_maps
from timm_csg.explain._run import (
    Path,
    StageRun,
    Targets,
    looking_at,
    readable,
    resized,
    run_head,
    run_stage,
)
from timm_csg.explain.gradients import backward_with_features
from timm_csg.explain.inputs import Images
from timm_csg.head import effective_weight, find_classifier, probe_head
from timm_csg.hooks import hint
from timm_csg.metrics.display import in_one_line
from timm_csg.metrics.gate import owned_filters
from timm_csg.model import is_differentiated
from timm_csg.stage import is_channels_last


@in_one_line
class Normalised(NamedTuple):
    """What ``normalise`` returns.

    Attributes:
        maps: The maps, in [0, 1].
        empty: Whether a map had nothing above zero [...] (the maps' shape without height and width); such maps are all
            zero and should be shown as "no evidence", not as a picture.
    """

    maps: Tensor
    empty: Tensor


def cam(model: nn.Module, images: Images, targets: Targets = None, *, upsample: bool = True) -> Tensor:
    """Class activation map: the classifier's weights of a class applied to every position of the last maps.

    M_c(x, y) = sum_k w_k^c f_k(x, y), the bias ignored (Zhou et al., CVPR 2016, https://arxiv.org/abs/1512.04150,
    equation 2). With average pooling, the mean of the map over positions plus the bias is the class's logit.

    Args:
        model: A timm classifier whose head is pooling → linear, plain or differentiated; left as found. Behind a
            mechanism that acts at inference (ICNN), the maps are the masked ones.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: what the standard path predicts.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage.

    Returns:
        [batch, height, width], logit units, negative where the position speaks against the class; not normalised.

    Raises:
        TypeError: If the model is not a timm classifier, or images or targets have the wrong type.
        ValueError: If the head has more between pooling and logits (``grad_cam`` takes those), or reads only a class
            token, or the features are tokens without a grid.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> cam(model, torch.zeros(1, 3, 64, 64), upsample=False).shape
        torch.Size([1, 2, 2])
    """
    with looking_at(model, images) as (inner, images):
        run = run_stage(inner, images, targets)
        if head_kind(inner, run.features) != "linear":
            raise ValueError(
                f"CAM needs a head that is pooling → linear, but {type(inner).__name__} has more between its maps and "
                "its logits; use explain.grad_cam, which equals CAM (divided by the number of positions, with "
                f"negative values set to 0) where CAM exists.{hint(inner)}"
            )
        _gradient_maps(inner, run, images)  # refuses heads that read only a class token
        weight = effective_weight(find_classifier(inner))[0][run.targets]
        maps = torch.einsum("bfhw,bf->bhw", to_maps(inner, run.features, images), weight)
        return readable(_sized(maps, images, upsample))


def grad_cam(
    model: nn.Module, images: Images, targets: Targets = None, *, upsample: bool = True, path: Path = "standard"
) -> Tensor:
    """Grad-CAM: the last maps, each weighted by the mean gradient of the class's logit, summed, negative parts cut.

    alpha_k = mean over positions of dy/dA_k; L = ReLU(sum_k alpha_k A_k), with y the logit before softmax (Selvaraju
    et al., ICCV 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2). Only the head is differentiated; the
    backbone runs once, without a graph.

    Args:
        model: Any timm classifier whose features form a grid, plain or differentiated; left as found. Behind a
            mechanism that acts at inference (ICNN), the maps are the masked ones.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: what the standard path predicts.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage.
        path: Which logit: ``"standard"``, or ``"gated"``, that of the gated path: with label gating through the gate of
            the target class, with assigned filters through the class's own filters.

    Returns:
        [batch, height, width], 0 or more, not normalised, see ``normalise``.

    Raises:
        TypeError: If the model is not a timm classifier, or images or targets have the wrong type.
        ValueError: If the features are tokens without a grid, or the head reads only a class token; or there is no
            gated path.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> grad_cam(model, torch.zeros(1, 3, 64, 64), targets=1).shape
        torch.Size([1, 64, 64])
    """
    with looking_at(model, images) as (inner, images):
        return readable(_sized(_grad_cam(inner, run_stage(inner, images, targets, path), images), images, upsample))


def guided_grad_cam(model: nn.Module, images: Images, targets: Targets = None) -> Tensor:
    """Guided Grad-CAM: guided backprop times the upsampled Grad-CAM map; fine detail where the class is seen.

    Selvaraju et al., ICCV 2017, section 3.2. One pass through the backbone serves both.

    Args:
        model: A timm classifier whose activations are all ReLUs and whose features form a grid; left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: the predicted class of each image.

    Returns:
        [batch, channels, height, width], no unit.

    Raises:
        TypeError: See ``grad_cam``.
        ValueError: As ``guided_backprop`` and ``grad_cam``.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> guided_grad_cam(model, torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 3, 64, 64])
    """
    with looking_at(model, images) as (inner, images):
        signal, features, indices = backward_with_features(inner, images, targets, "guided")
        maps = _sized(_grad_cam(inner, run_head(inner, features, indices), images), images, upsample=True)
        return readable(signal * maps[:, None])


def owner_map(
    model: nn.Module, images: Images, targets: Targets = None, *, upsample: bool = True, path: Path = "standard"
) -> Tensor:
    """The evidence for a class by the filters that it owns: what each place adds to the class's logit through them.

    M_c(x, y) = sum over own filters k of dy/dA_k(x, y) · A_k(x, y), with y the logit of class c. Where the head is
    pooling → linear, that is weight × response / positions, no gradient is needed (``timm_csg.export_onnx``), and the
    sum of the map over the grid is exactly what the class's own filters add to its logit; with a classifier masked to
    them (assigned filters), the sum plus the bias is the logit. Behind other heads it is a first-order estimate.

    Of a vision transformer, places are the patch tokens. A head that reads only the class token allows evidence by
    filter (``explain_prediction``), but none by place, and is refused. Where the mean is over all tokens (the gated
    path of assigned filters behind a norm), the sum of the map lacks what class and register tokens add.

    Args:
        model: A differentiated model whose features form a grid; left as found. Behind a mechanism that acts at
            inference (ICNN), the maps are the masked ones.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: what the standard path predicts.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage, where the sum holds.
        path: Which logit, see ``grad_cam``.

    Returns:
        [batch, height, width], logit units, negative where own filters speak against the class; not normalised. All 0
        for a class that owns no filter.

    Raises:
        TypeError: If the model is not a timm classifier, or images or targets have the wrong type.
        ValueError: If its filters have no owners, or see ``grad_cam``.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=2))
        >>> owner_map(model, torch.zeros(1, 3, 64, 64), upsample=False).shape
        torch.Size([1, 2, 2])
    """
    with looking_at(model, images) as (inner, images):
        owned = own_filters(inner)
        run = run_stage(inner, images, targets, path)
        evidence = _gradient_maps(inner, run, images) * to_maps(inner, run.features, images)
        maps = torch.einsum("bfhw,bf->bhw", evidence, owned[run.targets].to(evidence.dtype))
        return readable(_sized(maps, images, upsample))


def own_filters(model: Any) -> Tensor:
    """Which filters each class owns, bool [classes, filters].

    Raises:
        ValueError: If the filters of the model have no owners.
    """
    matrix = model.mechanism.class_filter_matrix() if is_differentiated(model) else None
    if matrix is None:
        why = "knows its filters' categories only after a training step" if is_differentiated(model) else "is plain"
        raise ValueError(
            f"the filters of {type(model).__name__} have no owners, because it {why}; differentiate() and train it, or "
            "use explain.grad_cam, which needs none."
        )
    return owned_filters(matrix)


def coarse_map(
    model: nn.Module, images: Images, targets: Targets = None, *, upsample: bool = True, path: Path = "standard"
) -> Tensor:
    """ReLU(dy/dF) · F, summed over filters: like Grad-CAM, but every position keeps its own gradient.

    Filters that speak against the class are left out instead of cancelling others.

    Args:
        model: Any timm classifier whose features form a grid, plain or differentiated; left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: what the standard path predicts.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage.
        path: Which logit, see ``grad_cam``.

    Returns:
        [batch, height, width], logit units; 0 or more where the stage's values are.

    Raises:
        TypeError, ValueError: As ``grad_cam``.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> coarse_map(model, torch.zeros(1, 3, 64, 64), upsample=False).shape
        torch.Size([1, 2, 2])
    """
    with looking_at(model, images) as (inner, images):
        run = run_stage(inner, images, targets, path)
        gradient = _gradient_maps(inner, run, images)
        maps = (F.relu(gradient) * to_maps(inner, run.features, images)).sum(dim=1)
        return readable(_sized(maps, images, upsample))


def normalise(maps: Tensor) -> Normalised:
    """Scale every map to [0, 1] on its own: negative values to 0, the largest to 1; maps without evidence are flagged.

    Zero stays zero, so that the scaled map does not invent evidence, as stretching from minimum to maximum would.

    Args:
        maps: [..., height, width], for example [batch, height, width] or [batch, filters, height, width].

    Returns:
        The scaled maps, and which of them were empty.

    Example:
        >>> normalise(torch.tensor([[[0.0, 2.0], [-1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
        Normalised(maps=tensor([[[0.0000, 1.0000],
                 [0.0000, 0.5000]],
        <BLANKLINE>
                [[0.0000, 0.0000],
                 [0.0000, 0.0000]]]), empty=tensor([False,  True]))
    """
    positive = F.relu(maps.nan_to_num())
    largest = positive.amax(dim=(-2, -1), keepdim=True)
    empty = largest <= 0
    return Normalised(positive / largest.masked_fill(empty, 1), empty[..., 0, 0])


def head_kind(model: Any, features: Tensor) -> str:
    """Kind of the head, see ``mechanisms.Head``; probed for plain models, remembered by differentiated ones."""
    if is_differentiated(model):
        return model.head_kind
    return probe_head(model, features.shape[1 if features.ndim == 4 and not is_channels_last(model) else -1])


def _grad_cam(model: Any, run: StageRun, images: Tensor) -> Tensor:
    weight = _gradient_maps(model, run, images).mean(dim=(2, 3))
    return F.relu(torch.einsum("bfhw,bf->bhw", to_maps(model, run.features, images), weight))


def _gradient_maps(model: Any, run: StageRun, images: Tensor) -> Tensor:
    """The gradient as maps [batch, filters, height, width], with an error where the head cannot see the grid."""
    gradient = to_maps(model, run.gradient, images)
    if run.gradient.ndim == 3 and not gradient.any() and run.gradient.any():
        raise ValueError(
            f"the head of {type(model).__name__} reads only the class token, so no gradient reaches the image tokens "
            "and the map would be empty. Use explain.gradient, or a model that pools the patches: "
            "timm.create_model(..., global_pool='avg')."
        )
    return gradient


def _sized(maps: Tensor, images: Tensor, upsample: bool) -> Tensor:
    return resized(maps[:, None], images).squeeze(1) if upsample else maps
