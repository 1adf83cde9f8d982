"""What single filters do: their maps, the strongest of a class, the images that drive one, and patches of those."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.checks import check_choice, whole
from timm_csg.explain._grid import to_maps
from timm_csg.explain._run import (
    Path,
    StageRun,
    Targets,
    looking_at,
    masked,
    per_filter,
    readable,
    resized,
    run_stage,
    unwrap,
)
from timm_csg.explain.class_maps import head_kind
from timm_csg.explain.inputs import Images, Loader, image_batches
from timm_csg.mechanisms.assigned import AssignedFilters
from timm_csg.metrics.display import in_one_line
from timm_csg.model import is_differentiated
from timm_csg.running import as_input

Filters = Tensor | list[int] | int | None


@in_one_line
class ClassFilters(NamedTuple):
    """What ``class_filters`` returns.

    Attributes:
        filters: Strongest filters of the target class, strongest first [batch, top].
        contribution: What each adds to the class's logit [batch, top].
        share: Contribution divided by the sum of all positive contributions [batch, top]; 0 or less for a filter that
            speaks against the class, 0 where nothing speaks for it.
        targets: The class indices that were explained [batch].
        exact: True if contributions plus the bias sum to the logit (pooling → linear: weight × pooled response);
            False where they are gradient × activation, a first-order estimate.
    """

    filters: Tensor
    contribution: Tensor
    share: Tensor
    targets: Tensor
    exact: bool


@in_one_line
class StrongestImages(NamedTuple):
    """What ``strongest_images`` returns, on the CPU; strongest first.

    Attributes:
        indices: Position of the images in the loader's order [filters, top]; -1 where the loader had fewer images.
        values: Response of the filter [filters, top].
        positions: Row and column of the strongest unit on the map [filters, top, 2].
        grid: Height and width of the map.
    """

    indices: Tensor
    values: Tensor
    positions: Tensor
    grid: tuple[int, int]


def filter_maps(model: nn.Module, images: Images, filters: Filters = None, *, upsample: bool = True) -> Tensor:
    """Where filters of the last stage respond: their maps as the standard path's head sees them.

    Args:
        model: Any timm classifier whose features form a grid, plain or differentiated; left as found. Behind a
            mechanism that acts at inference (ICNN), the maps are the masked ones.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        filters: Indices of the filters; None: all.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage.

    Returns:
        [batch, filters, height, width], the stage's own unit; signed where its values are (``find_stage(model)``).

    Raises:
        TypeError: If the model is not a timm classifier, or an argument has the wrong type.
        ValueError: If the features are tokens without a grid, or an index is out of range.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> filter_maps(model, torch.zeros(1, 3, 64, 64), [3, 5]).shape
        torch.Size([1, 2, 64, 64])
    """
    with looking_at(model, images) as (inner, images), torch.no_grad():
        features = masked(inner, inner.forward_features(as_input(inner, images)))
        maps = to_maps(inner, features, images)
        chosen = maps[:, _filter_indices(filters, maps.shape[1], maps.device)]
        return readable(resized(chosen, images) if upsample else chosen)


def class_filters(
    model: nn.Module, images: Images, targets: Targets = None, *, top: int = 5, path: Path = "standard"
) -> ClassFilters:
    """The filters that speak most for a class in each image, and how much of its logit each gives.

    Args:
        model: Any timm classifier, plain or differentiated; left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: what the standard path predicts.
        top: How many filters.
        path: Which logit, see ``grad_cam``.

    Returns:
        Filters, contributions and shares.

    Raises:
        TypeError: If the model is not a timm classifier, or an argument has the wrong type.
        ValueError: If ``top`` is not between 1 and the number of filters, or an argument is out of its range.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> found = class_filters(model, torch.ones(1, 3, 64, 64), top=3)
        >>> found.filters.shape, found.exact
        (torch.Size([1, 3]), True)
    """
    with looking_at(model, images) as (inner, images):
        run = run_stage(inner, images, targets, path)
        contribution = contributions(inner, run)
        check_top(top, contribution.shape[1])
        strongest = contribution.topk(top, dim=1)
        share = shares(contribution).gather(1, strongest.indices)
        exact = is_exact(inner, run.features, path)
        return ClassFilters(strongest.indices, strongest.values, share, run.targets, exact)


def contributions(model: Any, run: StageRun) -> Tensor:
    """Gradient × activation summed over positions [batch, filters]; weight × pooled response for linear heads."""
    return readable(per_filter(model, run.gradient) * per_filter(model, run.features)).sum(dim=2)


def shares(contribution: Tensor) -> Tensor:
    """Each contribution [batch, filters] divided by the sum of the positive ones; 0 where there is none."""
    evidence = contribution.clamp(min=0).sum(dim=1, keepdim=True)
    return torch.where(evidence > 0, contribution / evidence, torch.zeros_like(contribution))


def is_exact(model: Any, features: Tensor, path: Path) -> bool:
    """Whether the logits of a path are linear in the features, so that contributions and a constant sum to them."""
    if head_kind(model, features) == "linear":
        return True
    return path == "gated" and any(isinstance(part, AssignedFilters) for part in model.mechanism.modules())


def strongest_images(
    model: nn.Module,
    loader: Loader,
    filters: Filters = None,
    *,
    top: int = 9,
    by: Literal["mean", "max"] = "mean",
) -> StrongestImages:
    """The images of a data set that drive each filter most, and where. One pass; memory grows with filters × top only.

    Args:
        model: Any timm classifier whose features form a grid, plain or differentiated; left as found.
        loader: Yields image batches, or tuples that begin with them, in a fixed order: the result counts images. Or a
            folder of pictures, which are counted by name.
        filters: Indices of the filters; None: all.
        top: Images per filter.
        by: Rank by the filter's ``"mean"`` over positions or its ``"max"``.

    Returns:
        Indices, values and positions of the strongest units.

    Raises:
        TypeError: If the model is not a timm classifier, or an argument has the wrong type.
        ValueError: If the loader yields nothing, an argument is out of its range, or there is no grid.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> strongest_images(model, [torch.rand(4, 3, 64, 64)], [0, 7], top=2).indices.shape
        torch.Size([2, 2])
    """
    check_choice("by", by, ("mean", "max"))
    if (whole(top) or 0) < 1:
        raise ValueError(f"top must be an integer of at least 1, but is {top!r}.")
    best: StrongestImages | None = None
    seen = 0
    for images in image_batches(unwrap(model), loader):
        maps = filter_maps(model, images, filters, upsample=False).cpu()
        best = _merge(best, _ranked(maps, seen, by), top)
        seen += len(images)
    if best is None:
        raise ValueError("the loader is empty: it yielded no images.")
    return best


def _ranked(maps: Tensor, first: int, by: str) -> StrongestImages:
    """Values and positions of every image of one batch, [filters, batch]."""
    height, width = maps.shape[2:]
    largest = maps.flatten(2).max(dim=2)
    values = largest.values if by == "max" else maps.mean(dim=(2, 3))
    positions = torch.stack([largest.indices // width, largest.indices % width], dim=2).transpose(0, 1)
    indices = torch.arange(first, first + len(maps), device=maps.device).expand(maps.shape[1], -1)
    return StrongestImages(indices, values.T, positions, (height, width))


def _merge(best: StrongestImages | None, more: StrongestImages, top: int) -> StrongestImages:
    if best is None:
        filters = more.values.shape[0]
        nothing = more.values.new_full((filters, top), -torch.inf)
        none = torch.full((filters, top), -1, device=nothing.device)
        best = StrongestImages(none, nothing, none[..., None].expand(-1, -1, 2), more.grid)
    if best.grid != more.grid:
        raise ValueError(
            f"all images must have the same size, but there are maps of {best.grid} and {more.grid}; resize the images."
        )
    # Stable, so that the earlier of two equal images stays first whatever the batch size.
    order = torch.cat([best.values, more.values], dim=1).argsort(dim=1, descending=True, stable=True)[:, :top]
    indices, values = (torch.cat(pair, dim=1).gather(1, order) for pair in zip(best[:2], more[:2], strict=True))
    positions = torch.cat([best.positions, more.positions], dim=1)
    positions = positions.gather(1, order[..., None].expand(-1, -1, 2))
    return StrongestImages(indices, values, positions, best.grid)


def patches(images: Tensor, positions: Tensor, grid: tuple[int, int], *, size: float = 0.5) -> Tensor:
    """Cut from each image a square around the place that a position on the map stands for.

    A unit of a deep stage can see most of the image, so the square is not its theoretical receptive field; it shows
    where the filter's response is centred. Near a border the square is moved inside.

    Args:
        images: [batch, channels, height, width].
        positions: Row and column on the map [batch, 2], as in ``StrongestImages.positions``.
        grid: Height and width of the map.
        size: Side of the square as a share of the shorter side of the images.

    Returns:
        [batch, channels, side, side].

    Raises:
        ValueError: If shapes do not fit, a position is outside the grid, or ``size`` is not in (0, 1].

    Example:
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> patches(image, torch.tensor([[1, 0]]), (2, 2))
        tensor([[[[ 8.,  9.],
                  [12., 13.]]]])
    """
    if images.ndim != 4 or positions.shape != (len(images), 2):
        raise ValueError(
            f"expected images [batch, channels, height, width] and positions [batch, 2], but got {list(images.shape)} "
            f"and {list(positions.shape)}."
        )
    if not 0 < size <= 1:
        raise ValueError(f"size must be a fraction of the image, above 0 and at most 1, but is {size!r}.")
    sides = images.shape[-2:]
    inside = (positions >= 0) & (positions < torch.tensor(grid, device=positions.device))
    if not bool(inside.all()):
        raise ValueError(f"positions must lie on the grid {grid}, but are {positions.tolist()}.")
    side = max(1, round(size * min(sides)))
    cut = []
    for image, position in zip(images, positions.tolist(), strict=True):
        corner = []
        for place, cells, pixels in zip(position, grid, sides, strict=True):
            centre = (place + 0.5) * pixels / cells
            corner.append(min(max(0, round(centre - side / 2)), pixels - side))
        cut.append(image[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side])
    return torch.stack(cut)


def check_top(top: int, num_filters: int) -> None:
    """Raise a ValueError unless ``top`` is a number of filters."""
    if not 1 <= (whole(top) or 0) <= num_filters:
        raise ValueError(f"top must be an integer from 1 to {num_filters}, the number of filters, but is {top!r}.")


def _filter_indices(filters: Filters, num_filters: int, device: torch.device) -> Tensor:
    if filters is None:
        return torch.arange(num_filters, device=device)
    indices = torch.as_tensor(filters, device=device)
    if indices.numel() == 0:
        raise ValueError("filters must contain at least one filter; leave it out to get all of them.")
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim > 1:
        raise TypeError(f"filters must be filter indices [filters], but are {indices.dtype} {list(indices.shape)}.")
    indices = indices.long().reshape(-1)
    if int(indices.min()) < 0 or int(indices.max()) >= num_filters:
        raise ValueError(f"filters must be between 0 and {num_filters - 1}, but are {indices.tolist()}.")
    return indices


def filter_matrix(model: Any) -> Tensor | None:
    """How much each filter serves each class [classes, filters], None for plain models and mechanisms without one."""
    return model.mechanism.class_filter_matrix() if is_differentiated(model) else None
