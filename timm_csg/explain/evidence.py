"""The map of a class's evidence: what each place adds to the gated logit, against what pictures give on average."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from timm_csg.explain._grid import to_maps
from timm_csg.explain._run import StageRun, Targets, looking_at, picked, readable, resized, run_head, run_stage
from timm_csg.explain.class_maps import _gradient_maps
from timm_csg.explain.gradients import backward_with_features
from timm_csg.explain.inputs import Images
from timm_csg.mechanisms.assigned import AssignedFilters
from timm_csg.model import is_differentiated


def evidence_map(model: nn.Module, images: Images, targets: Targets = None, *, upsample: bool = True) -> Tensor:
    """Where the filters that a class owns respond more than they do on average, and where less.

    M_c(x, y) = mean over the class's own filters k of scale_k (A_k(x, y) - mean_k) / deviation_k, divided by the number
    of positions: what the gated path of assigned filters adds up. **The sum of the map over the grid, plus the class's
    bias, is exactly the gated logit.** CAM and Grad-CAM leave constants out, so that a filter's idle response counts as
    evidence everywhere; here it is subtracted, and a place with less than the average speaks against the class.

    Args:
        model: A model with assigned filters whose features form a grid; left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: what the standard path predicts.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage, where the sum holds.

    Returns:
        [batch, height, width], logit units, signed, not normalised.

    Raises:
        TypeError: If the model is not a timm classifier, or images or targets have the wrong type.
        ValueError: If the model has no assigned filters, or its features are tokens without a grid.

    Example:
        >>> import timm, torch, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=2))
        >>> evidence_map(model, torch.zeros(1, 3, 64, 64), upsample=False).shape
        torch.Size([1, 2, 2])
    """
    with looking_at(model, images) as (inner, images):
        maps = _evidence(inner, _assigned(inner), run_stage(inner, images, targets, "gated"), images)
        return resized(maps[:, None], images).squeeze(1) if upsample else maps


def guided_evidence_map(model: nn.Module, images: Images, targets: Targets = None) -> Tensor:
    """Guided backprop times the up-sampled evidence map, where that is positive: fine detail of a class's own evidence.

    ``guided_grad_cam`` (Selvaraju et al., ICCV 2017) with ``evidence_map`` in place of Grad-CAM. One pass through the
    backbone serves both.

    Args:
        model: A model with assigned filters whose activations are all ReLUs and whose features form a grid; left as
            found.
        images: See ``evidence_map``.
        targets: See ``evidence_map``.

    Returns:
        [batch, channels, height, width], no unit.

    Raises:
        TypeError: See ``evidence_map``.
        ValueError: As ``guided_backprop`` and ``evidence_map``.

    Example:
        >>> import timm, torch, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=2))
        >>> guided_evidence_map(model, torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 3, 64, 64])
    """
    with looking_at(model, images) as (inner, images):
        assigned = _assigned(inner)
        signal, features, indices = backward_with_features(inner, images, targets, "guided")
        maps = _evidence(inner, assigned, run_head(inner, features, indices, "gated"), images)
        return readable(signal * resized(maps[:, None], images).clamp(min=0))


def _assigned(model: Any) -> AssignedFilters:
    """The model's assigned filters.

    Raises:
        ValueError: If it has none.
    """
    parts = model.mechanism.modules() if is_differentiated(model) else ()
    assigned = next((part for part in parts if isinstance(part, AssignedFilters)), None)
    if assigned is None:
        raise ValueError(
            f"{type(model).__name__} has no assigned filters, whose averages the map is measured against; use "
            "explain.grad_cam, or differentiate() and train with mechanism='assigned'."
        )
    return assigned


def _evidence(model: Any, assigned: AssignedFilters, run: StageRun, images: Tensor) -> Tensor:
    """The map on the grid of the stage, of a pass through the gated path."""
    maps = (_gradient_maps(model, run, images) * to_maps(model, run.features, images)).sum(dim=1)
    logit = picked(run.logits, run.targets) - assigned.bias[run.targets]
    rest = logit - maps.sum(dim=(1, 2))  # the averages
    return readable(maps + rest[:, None, None] / maps[0].numel())
