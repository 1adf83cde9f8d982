"""One pass over a data set: what every other metric is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.metrics._model import evaluating, is_channels_last


class Activations(NamedTuple):
    """What ``collect`` returns; all on the CPU, one row per image.

    Attributes:
        features: Spatial mean of the stage's output, before any gate or mask, float32 [samples, filters].
        targets: Class indices, int64 [samples].
        logits: Logits of the standard path, float32 [samples, classes].
        gated_logits: Logits of the gated path, float32 [samples, classes]; None for a plain model. With label gating
            these are computed with the true label and say nothing about unseen images.
    """

    features: Tensor
    targets: Tensor
    logits: Tensor
    gated_logits: Tensor | None


@torch.no_grad()
def collect(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Activations:
    """Run a plain or differentiated timm model over a data set in eval mode, once.

    The map comes from ``forward_features``, so gates and masks do not change the features. Memory: 4 bytes per sample
    and filter, and 4 or 8 per sample and class.

    Args:
        model: A timm classifier; its modes are left as found.
        loader: Yields (images, class indices).
        amp_dtype: Autocast dtype, for example ``torch.bfloat16``; None: no autocast.
        progress: Called with the number of images after each batch.

    Returns:
        The activations.

    Raises:
        ValueError: If the loader yields nothing, or targets are not class indices.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> collect(model, [(torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1]))]).features.shape
        torch.Size([3, 96])
    """
    parts: list[tuple[Tensor, ...]] = []
    timm_model: Any = model  # its methods are not in nn.Module's type
    device = next(model.parameters()).device
    with evaluating(model):
        for images, targets in loader:
            if targets.ndim != 1 or targets.is_floating_point():
                raise ValueError(f"targets must be class indices [batch], but have shape {list(targets.shape)}.")
            images, targets = images.to(device, non_blocking=True), targets.to(device)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features = timm_model.forward_features(images)
                outputs = [
                    pool(features, channels_last=is_channels_last(model)),
                    targets,
                    timm_model.forward_head(features),
                ]
                if hasattr(model, "mechanism"):
                    outputs.append(timm_model.forward_head(features, targets=targets))
            parts.append(tuple(tensor.cpu() if tensor is targets else tensor.float().cpu() for tensor in outputs))
            if progress is not None:
                progress(len(targets))
    if not parts:
        raise ValueError("the loader yields no images.")
    features, targets, logits, *gated = (torch.cat(column) for column in zip(*parts, strict=True))
    return Activations(features, targets.long(), logits, gated[0] if gated else None)


def pool(features: Tensor, *, channels_last: bool = False) -> Tensor:
    """Mean over positions: [batch, filters] from a map [batch, filters, height, width], its NHWC form, or tokens.

    Example:
        >>> pool(torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]]))
        tensor([[2., 2.]])
    """
    if features.ndim == 4 and not channels_last:
        return features.mean(dim=(2, 3))
    return features.flatten(1, -2).mean(dim=1)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of samples whose largest logit is the target's.

    Args:
        logits: [samples, classes].
        targets: Class indices [samples].

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
        0.5
    """
    return float((logits.argmax(dim=1) == targets).double().mean())
