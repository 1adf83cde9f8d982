"""Where in the image a position of a model's map looks: centre and size of receptive fields, for any conv model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_csg.checks import whole
from timm_csg.measuring._edges import Edges, NotLocalError, pixel_edges
from timm_csg.metrics.display import in_one_line
from timm_csg.running import as_input, check_images, measured
from timm_csg.stage import is_channels_last


@in_one_line
class ReceptiveField(NamedTuple):
    """Receptive fields of a map's positions, in pixels of the input; pixel i covers [i, i + 1), so its centre is i + ½.

    Attributes:
        centre_y: Middle of the field of each row of the map [map height], float32; may lie outside the image.
        centre_x: Middle of the field of each column [map width].
        size: Height and width of a field, borders of the image ignored; the image's own size where ``local`` is False.
        local: False if the model mixes all positions (attention): the centres are then those of the map's grid cells.
    """

    centre_y: Tensor
    centre_x: Tensor
    size: tuple[float, float]
    local: bool


def receptive_field(
    model: nn.Module, image_size: int | tuple[int, int], *, channels: int | None = None
) -> ReceptiveField:
    """Centre and size of the receptive fields of a timm model's last stage, computed by one pass without weights.

    Factors and terms that are the same for all positions (squeeze-and-excitation, global response normalisation) are
    not counted, though strictly they make every field the whole image.

    Args:
        model: A timm model whose ``forward_features`` returns a map; left as found.
        image_size: Side, or height and width, of the images in pixels: padding, and so the centres, may depend on it.
        channels: Channels of the images; None: the model's.

    Returns:
        The receptive fields.

    Raises:
        ValueError: If the features are not a map.

    Example:
        >>> import timm
        >>> field = receptive_field(timm.create_model("resnet18"), 64)
        >>> field.centre_y, field.size
        (tensor([ 0.5000, 32.5000]), (435.0, 435.0))
    """
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    height, width = (whole(side) or 0 for side in sides) if len(sides) == 2 else (0, 0)
    if min(height, width) < 1:
        raise ValueError(f"image_size must be one or two whole numbers, 1 or more, but is {image_size!r}.")
    with measured(model), torch.no_grad():
        if channels is None:
            channels = int(get_model_input_config(model)["input_size"][0])
        edges = _edges_of_map(model, height, width, channels)
        if edges is not None:
            top, bottom, left, right = edges[0, :, 0], -edges[1, :, 0], edges[2, 0], -edges[3, 0]
            size = (float((bottom - top).max()), float((right - left).max()))
            return ReceptiveField((top + bottom) / 2, (left + right) / 2, size, local=True)
        rows, columns = _grid(model, height, width, channels)
    centre_y, centre_x = (
        (torch.arange(n, device="cpu") + 0.5) * (side / n) for n, side in ((rows, height), (columns, width))
    )
    return ReceptiveField(centre_y, centre_x, (float(height), float(width)), local=False)


def _edges_of_map(model: Any, height: int, width: int, channels: int) -> Tensor | None:
    """First row, minus last row, first column, minus last column [4, map height, map width]; None if not local."""
    device = next(model.parameters()).device
    try:
        features = model.forward_features(Edges(pixel_edges(height, width, channels).to(device)))
    except NotLocalError:
        return None
    if not isinstance(features, Edges) or features.ndim != 4:
        return None
    edges = features.value.amin(dim=-1 if is_channels_last(model) else 1).cpu()
    # Behind a gate that looks at the whole image in an unforeseen way all places look alike.
    moves = (edges[:2].diff(dim=1).abs() > 0).all() and (edges[2:].diff(dim=2).abs() > 0).all()
    return edges if moves else None


def _grid(model: Any, height: int, width: int, channels: int) -> tuple[int, int]:
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    features = model.forward_features(torch.zeros(1, channels, height, width, device="cpu").to(parameter))
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise ValueError(
            f"{type(model).__name__} has no feature map, so its positions have no location in the image; use a model "
            "with a feature map (see find_stage(model).layout)."
        )
    rows, columns = features.shape[1:3] if is_channels_last(model) else features.shape[2:]
    return int(rows), int(columns)


def effective_diameter(model: nn.Module, images: Tensor) -> float:
    """Diameter of the disc that spreads as far as the gradient of the map's middle position, in pixels of the input.

    The theoretical field of a deep network is mostly unused (Luo et al., NeurIPS 2016, https://arxiv.org/abs/1701.04128).
    Here: the energy of the gradient of the sum over filters with respect to the images, averaged over them; its root
    mean square distance r to its own centre; a disc of even weight with this r has the diameter 2 √2 r.

    Args:
        model: A timm model whose features are a map; left as found.
        images: A batch of real images [batch, channels, height, width].

    Returns:
        The diameter; at least 1.

    Raises:
        ValueError: If no filter responds at the centre of the images.

    Example:
        >>> import timm
        >>> images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> effective_diameter(timm.create_model("test_resnet"), images) < 64
        True
    """
    timm_model: Any = model
    with measured(model):
        check_images(model, images)
        images = as_input(model, images)
        with torch.no_grad():  # some models cache what they compute first, and a cache with a graph cannot be copied
            timm_model.forward_features(images[:1])
        with torch.enable_grad():
            images = images.requires_grad_()
            features = timm_model.forward_features(images)
            features = features.permute(0, 3, 1, 2) if is_channels_last(model) else features
            middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(middle.sum(), images)
    energy = gradient.double().square().sum(dim=(0, 1))
    if not energy.any():
        raise ValueError("no filter responds at the centre of these images; pass other images, or a diameter.")
    energy = energy / energy.sum()
    spread = 0.0
    for dim in (0, 1):
        along = energy.sum(dim=1 - dim)
        place = torch.arange(len(along), dtype=torch.float64, device=along.device)
        spread += float((along * (place - (along * place).sum()) ** 2).sum())
    return max(1.0, 2 * math.sqrt(2 * spread))
