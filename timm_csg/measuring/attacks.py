"""Attacks that change an image a little so that the model errs: FGSM and PGD, with strengths in pixel units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.running import as_input, check_labelled, evaluating


def fgsm(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    eps: float,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Fast gradient sign method: one step of size ``eps`` up the loss, in every pixel.

    x + eps × sign(∂ cross-entropy(model(x), y) / ∂x), clipped to valid pixels. Goodfellow, Shlens & Szegedy, ICLR 2015
    (https://arxiv.org/abs/1412.6572), equation in section 4. Pixels where the gradient is 0 stay.

    Args:
        model: A plain or differentiated timm classifier; attacked is the standard path, in eval mode. Modes, gradients
            and random state are left as found.
        images: As the model takes them, normalised [batch, channels, height, width].
        targets: True classes [batch].
        eps: Largest change of a pixel, in units of [0, 1] before normalisation, for example 8 / 255.
        mean: With which the images were normalised, per channel; None: ``model.pretrained_cfg``'s.
        std: The same.

    Returns:
        The attacked images [batch, channels, height, width], normalised like the given ones.

    Raises:
        ValueError: If mean and std lead to pixels outside [0, 1], or are not known.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        >>> images = torch.tensor([0.5, 0.95]).view(1, 1, 1, 2)
        >>> fgsm(model, images, torch.tensor([0]), eps=0.1, mean=[0.0], std=[1.0]).flatten()
        tensor([0.4000, 1.0000])
    """
    return pgd(model, images, targets, eps=eps, step=eps, steps=1, random_start=False, mean=mean, std=std)


def pgd(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step: float | None = None,
    random_start: bool = True,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Projected gradient descent: several sign steps up the loss, each clipped to ``eps`` around the image.

    Madry et al., ICLR 2018 (https://arxiv.org/abs/1706.06083), section 2.1, with a uniform random start.

    Args:
        model: See ``fgsm``.
        images: As the model takes them, normalised [batch, channels, height, width].
        targets: True classes [batch].
        eps: Largest change of a pixel, in units of [0, 1] before normalisation.
        steps: Gradient steps.
        step: Size of one, in the units of ``eps``; None: 2.5 × eps / steps.
        random_start: Begin at a random point within ``eps``, and not at the image.
        seed: Of the start; the global random state is not used. Change it from batch to batch.
        mean: With which the images were normalised, per channel; None: ``model.pretrained_cfg``'s.
        std: The same.

    Returns:
        The attacked images [batch, channels, height, width], normalised like the given ones.

    Raises:
        ValueError: If mean and std lead to pixels outside [0, 1], or are not known, or an option is wrong.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        >>> images = torch.tensor([0.5, 0.95]).view(1, 1, 1, 2)
        >>> pgd(model, images, torch.tensor([0]), eps=0.1, mean=[0.0], std=[1.0]).flatten()
        tensor([0.4000, 1.0000])
    """
    if not 0 <= eps <= 1 or steps < 1 or (step is not None and step < 0):
        raise ValueError(
            "eps must be between 0 and 1 (for 8 grey levels pass 8 / 255), steps at least 1, and step not negative, "
            f"but found eps={eps}, steps={steps}, step={step}."
        )
    check_labelled(model, images, targets)
    images = as_input(model, images)
    targets = targets.to(images.device).long()
    scale, low, high = _pixel_units(model, images, mean, std)
    low, high = torch.maximum(low, images - eps * scale), torch.minimum(high, images + eps * scale)
    step = 2.5 * eps / steps if step is None else step
    with torch.inference_mode(mode=False), torch.enable_grad(), evaluating(model):
        attacked = images.clone()
        if random_start:
            noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(images)
            attacked = torch.clamp(attacked + (2 * noise - 1) * eps * scale, low, high)
        for _ in range(steps):
            attacked.requires_grad_()
            loss = F.cross_entropy(model(attacked), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, attacked)
            attacked = torch.clamp(attacked.detach() + step * scale * gradient.sign(), low, high)
    return attacked


def _pixel_units(
    model: Any, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Size of one unit of [0, 1] in normalised values, and the values of black and white, each [1, channels, 1, 1]."""
    known = getattr(model, "pretrained_cfg", None) or {}
    mean, std = known.get("mean") if mean is None else mean, known.get("std") if std is None else std
    if mean is None or std is None:
        raise ValueError(f"{type(model).__name__} does not state how its images are normalised; pass mean= and std=.")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"mean and std need one value per channel ({images.shape[1]}), but are {tuple(mean)} and {tuple(std)}."
        )
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be more than 0 for every channel, but is {tuple(std)}.")
    scale = 1 / torch.tensor(std, dtype=torch.float64, device="cpu")[:, None, None]
    low = -torch.tensor(mean, dtype=torch.float64, device="cpu")[:, None, None] * scale
    low, high, scale = (value[None].to(images) for value in (low, low + scale, scale))
    pixels = (images - low) / scale
    if len(images) and (float(pixels.min()) < -0.01 or float(pixels.max()) > 1.01):
        raise ValueError(
            f"with mean {tuple(mean)} and std {tuple(std)} the pixels lie between {float(pixels.min()):.2f} and "
            f"{float(pixels.max()):.2f}, not in [0, 1]; pass the mean and std that the images were normalised with."
        )
    return scale, low, high
