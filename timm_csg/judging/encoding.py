"""Embeddings of pictures by an independent encoder: what MonoScore needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_csg.running import checked_batches, evaluating


@torch.no_grad()
def embed(
    encoder: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """What a timm model without its classifier makes of the pictures of a loader that was made for another model.

    Args:
        encoder: A timm model with ``num_classes=0``, best a pretrained one of another family; left as found. Its
            ``pretrained_cfg`` says size, mean and deviation that it expects.
        loader: Yields (images, targets), normalised for the other model.
        mean: With which the loader's images were normalised; None: they come as the encoder expects them.
        std: Their deviation, with ``mean``.

    Returns:
        float32 [pictures, dimensions], on the CPU.

    Raises:
        TypeError, ValueError: If the loader is empty, or the encoder does not return vectors.

    Example:
        >>> import timm
        >>> encoder = timm.create_model("test_resnet", num_classes=0)
        >>> embed(encoder, [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]).shape
        torch.Size([2, 96])
    """
    config: Any = getattr(encoder, "pretrained_cfg", {})
    like = next(parameter for parameter in encoder.parameters() if parameter.is_floating_point())
    found = []
    with evaluating(encoder):
        for images, _ in checked_batches(encoder, loader, soft=True):
            pictures = images.float()
            if mean is not None and std is not None:
                pictures = pictures * _channels(std, pictures) + _channels(mean, pictures)
                pictures = (pictures - _channels(config["mean"], pictures)) / _channels(config["std"], pictures)
            size = tuple(config.get("input_size", images.shape[1:])[1:])
            if tuple(pictures.shape[2:]) != size:
                pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
            embedded = encoder(pictures.to(like))
            if not isinstance(embedded, Tensor) or embedded.ndim != 2:
                raise ValueError(
                    f"{type(encoder).__name__} must return a vector for each picture; make it with "
                    "timm.create_model(name, pretrained=True, num_classes=0)."
                )
            found.append(embedded.float().cpu())
    if not found:
        raise ValueError("the loader is empty: it yielded no images.")
    return torch.cat(found)


def _channels(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(-1, 1, 1)
