"""Why one class rather than another: the filters and places that decide between two classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.explain._grid import to_maps
from timm_csg.explain._run import Path, StageRun, looking_at, per_filter, picked, readable, resized, run_head
from timm_csg.explain.filters import check_top, filter_matrix, is_exact
from timm_csg.explain.inputs import Images
from timm_csg.labels import class_index, class_names
from timm_csg.metrics import owners
from timm_csg.metrics.display import in_one_line
from timm_csg.running import as_input


@in_one_line
class Contrast(NamedTuple):
    """What ``contrast`` returns; positive numbers speak for the first class, negative ones for the second.

    Attributes:
        classes: Indices of the two classes.
        difference: Logit of the first class minus that of the second [batch].
        contribution: What each filter adds to the difference [batch, filters].
        constant: What no filter adds [batch]: contributions and constant sum to the difference. Where ``exact``, it is
            the difference of the biases; elsewhere also what a first-order estimate leaves out.
        filters: Those with the largest contributions, for either class, largest first [batch, top].
        deciding: The fewest filters without whose contributions the class that is ahead would no longer be [batch,
            filters], bool. All that speak for it, where even that would not be enough.
        maps: What each place adds to the difference through each of ``filters`` [batch, top, height, width]; None for
            tokens without a grid, and where the head reads only a class token.
        map: The same for all filters together [batch, height, width]. On the stage's grid (``upsample=False``) it sums
            to what all filters add, but for class and register tokens.
        owner: The class that each filter serves most, -1 for none [filters]; None without a class-filter matrix.
        exact: Whether the head is linear, so that contributions are what the logits are made of.
    """

    classes: tuple[int, int]
    difference: Tensor
    contribution: Tensor
    constant: Tensor
    filters: Tensor
    deciding: Tensor
    maps: Tensor | None
    map: Tensor | None
    owner: Tensor | None
    exact: bool


def contrast(
    model: nn.Module,
    images: Images,
    one: str | int,
    other: str | int,
    *,
    top: int = 5,
    upsample: bool = True,
    path: Path = "standard",
) -> Contrast:
    """Which filters, and which places, decide between two classes in each image, in logits.

    A filter adds (w_one − w_other) · response to the difference of the two logits where the head is pooling → linear;
    all filters and the difference of the biases sum to it exactly. Behind other heads it is gradient × activation, a
    first-order estimate. Where classes own their filters and the classifier is masked to them (assigned filters), only
    filters of the two classes take part.

    Args:
        model: Any timm classifier, plain or differentiated; left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        one: Name (if the model knows its classes' names) or index of the first class.
        other: The second class.
        top: How many filters have a map.
        upsample: Bilinear, to the size of the images; otherwise on the grid of the stage, where the sum holds.
        path: Which logits, see ``grad_cam``.

    Returns:
        Contributions, the filters that decide, and where.

    Raises:
        TypeError: If the model is not a timm classifier, or images have the wrong type.
        ValueError: If there is no such class, both are the same, or an argument is out of its range.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=3)
        >>> model.pretrained_cfg["label_names"] = ["cat", "dog", "owl"]
        >>> found = contrast(model, torch.ones(1, 3, 64, 64), "cat", "dog", top=2)
        >>> found.classes, found.filters.shape, found.maps.shape
        ((0, 1), torch.Size([1, 2]), torch.Size([1, 2, 64, 64]))
    """
    with looking_at(model, images) as (inner, images):
        names = class_names(inner) or [str(index) for index in range(int(inner.num_classes))]
        classes = class_index(one, names), class_index(other, names)
        if classes[0] == classes[1]:
            raise ValueError(f"a contrast needs two classes, but both are {names[classes[0]]!r}.")
        with torch.no_grad():
            features = inner.forward_features(as_input(inner, images))
        first, second = (run_head(inner, features, index, path) for index in classes)
        slope = first.gradient - second.gradient
        contribution = readable(per_filter(inner, slope) * per_filter(inner, first.features)).sum(dim=2)
        check_top(top, contribution.shape[1])
        difference = readable(picked(first.logits, first.targets) - picked(second.logits, second.targets))
        filters = contribution.abs().topk(top, dim=1).indices
        every = _maps(inner, slope, first, images)
        maps = None if every is None else every.gather(1, filters[..., None, None].expand(-1, -1, *every.shape[2:]))
        whole = None if every is None else every.sum(dim=1, keepdim=True)
        if upsample and maps is not None and whole is not None:
            maps, whole = resized(maps, images), resized(whole, images)
        matrix = filter_matrix(inner)
        return Contrast(
            classes=classes,
            difference=difference,
            contribution=contribution,
            constant=difference - contribution.sum(dim=1),
            filters=filters,
            deciding=deciding_filters(contribution, difference),
            maps=maps,
            map=None if whole is None else whole[:, 0],
            owner=None if matrix is None else owners(matrix),
            exact=is_exact(inner, first.features, path),
        )


def deciding_filters(contribution: Tensor, difference: Tensor) -> Tensor:
    """The fewest filters whose contributions, taken away, turn a difference around.

    Args:
        contribution: What each filter adds [batch, filters].
        difference: To what; its sign says which class is ahead [batch].

    Returns:
        Bool [batch, filters]: the strongest for the class that is ahead, until the rest is 0 or less; all that speak
        for it where it never is.

    Example:
        >>> deciding_filters(torch.tensor([[3.0, 2.0, 1.0, -2.0]]), torch.tensor([4.0])).tolist()
        [[True, True, False, False]]
    """
    support = (contribution * difference.sign()[:, None]).clamp(min=0)
    strongest = support.sort(dim=1, descending=True, stable=True)
    before = strongest.values.cumsum(dim=1) - strongest.values
    needed = (before < difference.abs()[:, None]) & (strongest.values > 0)
    return torch.zeros_like(needed).scatter(1, strongest.indices, needed)


def _maps(model: Any, slope: Tensor, run: StageRun, images: Tensor) -> Tensor | None:
    """What each place adds through each filter [batch, filters, height, width]; None where places have no part."""
    try:
        gradient = to_maps(model, slope, images)
        unread = slope.ndim == 3 and slope.any() and not gradient.any()
        return None if unread else readable(gradient * to_maps(model, run.features, images))
    except ValueError:
        return None
