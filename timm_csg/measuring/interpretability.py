"""Part interpretability: the share of images in which a filter's valid region fits a part of the object.

Zhang et al., "Interpretable Convolutional Neural Networks", CVPR 2018, section 4.2 (https://arxiv.org/abs/1710.00935),
after Bau et al., "Network Dissection", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.checks import check_fraction
from timm_csg.measuring.fields import ReceptiveField, effective_diameter, receptive_field
from timm_csg.metrics.display import in_one_line
from timm_csg.metrics.regions import check_regions, region_masks
from timm_csg.running import checked_batches, measured
from timm_csg.stage import seen_maps


@in_one_line
class PartInterpretability(NamedTuple):
    """What ``part_interpretability`` returns.

    Attributes:
        shares: P for each class, filter and part: share of the images of the class with this part in which the filter
            is associated with it, float32 [classes, filters, parts]; NaN where no image of the class has the part.
        thresholds: Value that a filter exceeds at the given share of all positions [filters].
        diameter: Of the disc around each valid position, in pixels of the input.
    """

    shares: Tensor
    thresholds: Tensor
    diameter: float

    @property
    def per_filter(self) -> Tensor:
        """P of each filter's best part, [classes, filters]."""
        return self.shares.nan_to_num(nan=-1.0).amax(dim=2).where(~self.shares.isnan().all(dim=2), torch.nan)

    @property
    def per_class(self) -> Tensor:
        """The one-class form for every class: mean over filters, [classes]."""
        return self.per_filter.nanmean(dim=1)

    def by_owner(self, owners: Tensor) -> Tensor:
        """The multi-class form: each filter on the class it belongs to.

        Args:
            owners: Class index of each filter [filters], -1 for nobody's.

        Returns:
            P of each filter's best part on its class [filters]; take its ``nanmean()``.
        """
        owners = owners.cpu().long()
        found = self.per_filter.gather(0, owners.clamp(min=0)[None])[0]
        return found.where(owners >= 0, torch.nan)


def value_exceeded(maps: Iterable[Tensor], count: int) -> Tensor:
    """The value that each filter exceeds at ``count`` positions, without keeping the maps (fewer where values tie).

    Args:
        maps: Maps [images, filters, height, width], one after the other.
        count: Number of positions, over all maps, that are to lie above.

    Returns:
        Values [filters]: the (count + 1)-th largest. Memory: 4 x (count + 1) bytes for each filter.

    Example:
        >>> value_exceeded([torch.tensor([[[[0.0, 3.0]]]]), torch.tensor([[[[2.0, 1.0]]]])], count=1)
        tensor([2.])
    """
    largest: Tensor | None = None
    for batch in maps:
        rows = batch.transpose(0, 1).flatten(1).float()
        rows = rows if largest is None else torch.cat([largest, rows], dim=1)
        largest = rows.topk(min(count + 1, rows.shape[1]), dim=1).values
    if largest is None:
        raise ValueError("maps is empty; pass the maps of at least one image.")
    return largest[:, -1]


def discs(field: ReceptiveField, diameter: float, image_size: tuple[int, int]) -> Tensor:
    """The part of the image that each position stands for, a disc around its centre: bool [positions, height x width].

    Example:
        >>> field = ReceptiveField(torch.tensor([0.5]), torch.tensor([0.5, 2.5]), (3.0, 3.0), True)
        >>> discs(field, 1.0, (1, 3)).int()
        tensor([[1, 0, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    rows, columns = torch.arange(image_size[0], device="cpu") + 0.5, torch.arange(image_size[1], device="cpu") + 0.5
    square_y = (rows - field.centre_y[:, None]) ** 2  # [map height, height]
    square_x = (columns - field.centre_x[:, None]) ** 2
    square = square_y[:, None, :, None] + square_x[None, :, None, :]
    return (square <= (diameter / 2) ** 2).flatten(2).flatten(0, 1)


def part_overlaps(valid: Tensor, covered: Tensor, parts: Tensor) -> Tensor:
    """Intersection over union of the regions of one image's filters with its parts.

    Args:
        valid: Whether each position of each filter's map is above its threshold, bool [filters, positions].
        covered: Pixels that each position stands for, bool [positions, pixels], see ``discs``.
        parts: Masks, bool [parts, pixels].

    Returns:
        [filters, parts]; 0 where a filter has no valid position.

    Example:
        >>> valid = torch.tensor([[True, False]])
        >>> part_overlaps(valid, torch.tensor([[1, 1, 0], [0, 0, 1]]), torch.tensor([[0, 1, 1]]))
        tensor([[0.3333]])
    """
    region = (valid.float() @ covered.float() > 0).float()
    shared = region @ parts.float().T
    union = region.sum(dim=1, keepdim=True) + parts.float().sum(dim=1) - shared
    return shared / union.clamp_min(1)


@torch.no_grad()
def part_interpretability(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    parts: Tensor,
    num_classes: int | None = None,
    *,
    share: float = 0.005,
    iou: float = 0.2,
    diameter: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> PartInterpretability:
    """Share of images in which each filter's valid region fits a part, for each class, filter and part.

    T_f is the value that filter f exceeds at 0.5 % of the positions of all images; its region S_f in an image is the
    union of the receptive fields, taken as discs, of the positions above T_f; it is associated with part k where
    intersection over union is above 0.2. P_{f,k} is the share of the images of a class that have the part; P_f the
    largest over parts. For the one-class form as in the paper pass only the images of that class.

    The size of a field is not the theoretical one, which in deep networks is larger than the image, but the effective
    one, measured on the first batch: see ``effective_diameter``. The paper estimates it by occlusion; values depend on
    it, so compare models at one ``diameter``.

    Args:
        model: A timm classifier whose features are a map; left as found.
        loader: Yields (images, class indices), not shuffled; it is read twice. Maps are not kept: memory is
            4 x share x images x positions bytes for each filter (4 MB for 800 images, 1,280 filters and 14x14
            positions, whose maps would be 803 MB), and the maps and masks of one batch.
        parts: Boxes of the parts [images, parts, 4] in pixels of the input, NaN where absent, or masks, bool [images,
            parts, height, width].
        num_classes: Number of classes; the largest target + 1 if left out.
        share: Of the positions that are valid.
        iou: Overlap above which filter and part are associated (Network Dissection: 0.04).
        diameter: Of a field in pixels; measured if left out.
        progress: Called with the number of images after each batch of the second reading.

    Returns:
        The shares; ``.per_class`` is the one-class form, ``.by_owner(owners)`` the multi-class form.

    Raises:
        ValueError: If the model has no map, or rows and images do not match.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]
        >>> boxes = torch.tensor([[[8.0, 8.0, 40.0, 40.0]]] * 2)
        >>> part_interpretability(model, loader, boxes).shares.shape
        torch.Size([2, 96, 1])
    """
    check_fraction("share", share, 0.0, 1.0)
    with measured(model):
        maps = (seen_maps(model, images) for images, _ in checked_batches(model, loader))
        thresholds = _thresholds(maps, share, len(parts))
        hits: dict[int, Tensor] = {}
        counts: dict[int, Tensor] = {}
        start, covered = 0, None
        for images, targets in checked_batches(model, loader, progress):
            size, stop = (int(images.shape[2]), int(images.shape[3])), start + len(images)
            check_regions(parts, stop, 3, size, "parts")
            if covered is None:
                field = receptive_field(model, size, channels=images.shape[1])
                diameter = effective_diameter(model, images) if diameter is None else diameter
                covered = discs(field, diameter, size).to(images.device)
            valid = (seen_maps(model, images) > thresholds[:, None, None]).flatten(2)
            masks = region_masks(parts, slice(start, stop), *size).flatten(2).to(images.device)
            for one, target, parts_of_one in zip(valid, targets.tolist(), masks, strict=True):
                active = one.any(dim=1)
                found = torch.zeros(len(one), parts.shape[1], device="cpu")
                found[active.cpu()] = (part_overlaps(one[active], covered, parts_of_one) > iou).float().cpu()
                hits[target] = hits.get(target, 0) + found
                counts[target] = counts.get(target, 0) + parts_of_one.any(dim=1).float().cpu()
            start = stop
    if start != len(parts) or diameter is None:
        raise ValueError(f"parts have {len(parts)} rows, but the loader yields {start} images.")
    num_classes = max(hits) + 1 if num_classes is None else num_classes
    shares = torch.full((num_classes, len(thresholds), parts.shape[1]), torch.nan, device="cpu")
    for target, found in hits.items():
        shares[target] = torch.where(counts[target] > 0, found / counts[target], torch.nan)
    return PartInterpretability(shares, thresholds.cpu(), float(diameter))


def _thresholds(maps: Iterable[Tensor], share: float, images: int) -> Tensor:
    iterator = iter(maps)
    first = next(iterator, None)
    if first is None:
        raise ValueError("the loader is empty: it yielded no images.")
    count = int(share * images * first.shape[2] * first.shape[3])
    return value_exceeded((batch for batches in ([first], iterator) for batch in batches), count)
