"""Location instability: how much the place where a filter fires moves about relative to an object's landmarks.

Zhang et al., "Interpretable Convolutional Neural Networks", CVPR 2018, section 4.2 (https://arxiv.org/abs/1710.00935).
A filter that means a part keeps its distance to every landmark, from picture to picture.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.metrics.display import in_one_line
from timm_csg.peaks import peak


@in_one_line
class Peaks(NamedTuple):
    """Where each filter fires most strongly in each image; all on the CPU, 12 bytes for each image and filter.

    Attributes:
        strength: The largest value of the map, float32 [images, filters].
        place: x and y of its receptive field's centre, in pixels of the input, float32 [images, filters, 2].
        targets: Class indices, int64 [images].
        image_size: Height and width of the input.
    """

    strength: Tensor
    place: Tensor
    targets: Tensor
    image_size: tuple[int, int]


@in_one_line
class LocationInstability(NamedTuple):
    """What ``location_instability`` returns.

    Attributes:
        deviations: D for each class, filter and landmark, in image diagonals, float32 [classes, filters, landmarks];
            NaN where fewer than two images of the class have the landmark.
        images: How many images each entry was estimated from, int64 [classes, filters, landmarks].
        silent: Share of these in which the filter has no positive response anywhere, so that its place means nothing.
    """

    deviations: Tensor
    images: Tensor
    silent: float

    @property
    def per_filter(self) -> Tensor:
        """Mean over landmarks, [classes, filters]."""
        return self.deviations.nanmean(dim=2)

    @property
    def per_class(self) -> Tensor:
        """The one-class form for every class: mean over filters and landmarks, [classes]."""
        return self.per_filter.nanmean(dim=1)

    @property
    def multi_class(self) -> float:
        """The multi-class form: mean over filters of the smallest mean over landmarks of any class."""
        values = self.per_filter
        lowest = values.nan_to_num(nan=torch.inf).amin(dim=0)
        return float(lowest[lowest.isfinite()].mean())

    def by_owner(self, owners: Tensor) -> Tensor:
        """Each filter on the class it belongs to, instead of the class where it is steadiest.

        Args:
            owners: Class index of each filter [filters], -1 for nobody's, for example
                ``owners(model.mechanism.class_filter_matrix())``.

        Returns:
            Mean over landmarks [filters]; take its ``nanmean()``.
        """
        owners = owners.cpu().long()
        found = self.per_filter.gather(0, owners.clamp(min=0)[None])[0]
        return found.where(owners >= 0, torch.nan)


def location_instability(
    peaks: Peaks, landmarks: Tensor, num_classes: int | None = None, *, top: int = 100, drop_silent: bool = False
) -> LocationInstability:
    """Standard deviation of the distance between a filter's peak and a landmark, for each class, filter and landmark.

    D_{f,k} = sqrt(var_I d_I(p_k, p_f)) over the ``top`` images of the class in which filter f fires most strongly and
    which contain landmark k; d_I is the distance in the image divided by its diagonal, var the sample variance (N − 1).
    With fewer images than ``top``, all of them count.

    Args:
        peaks: Result of ``measuring.collect_peaks``.
        landmarks: x, y of each landmark in pixels of the input [images, landmarks, 2]; NaN where absent.
        num_classes: Number of classes; the largest target + 1 if left out.
        top: Images for each filter and landmark.
        drop_silent: Leave out images in which the filter has no positive response. The paper does not; with few images
            the place of a filter that is zero everywhere (the first position of the map) would count otherwise.

    Returns:
        The deviations; ``.per_class.nanmean()`` is the paper's one-class average, ``.multi_class`` its other form.

    Raises:
        ValueError: If shapes do not agree, or ``top`` is below 2.

    Example:
        >>> peaks = Peaks(
        ...     strength=torch.ones(2, 1),
        ...     place=torch.tensor([[[30.0, 0.0]], [[10.0, 0.0]]]),
        ...     targets=torch.tensor([0, 0]),
        ...     image_size=(30, 40),
        ... )
        >>> location_instability(peaks, torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]])).deviations
        tensor([[[0.2828]]])
    """
    _check(peaks, landmarks, top)
    num_classes = int(peaks.targets.max()) + 1 if num_classes is None else num_classes
    filters, parts = peaks.strength.shape[1], landmarks.shape[1]
    deviations = torch.full((num_classes, filters, parts), torch.nan, device="cpu")
    counts = torch.zeros_like(deviations)
    silent, used = 0.0, 0.0
    for index in range(num_classes):
        for part in range(parts):
            rows = (peaks.targets == index) & ~landmarks[:, part].isnan().any(dim=1)
            if not rows.any():
                continue
            strength, order = peaks.strength[rows].topk(min(top, int(rows.sum())), dim=0)
            place = peaks.place[rows].gather(0, order[..., None].expand(-1, -1, 2))
            mark = landmarks[rows, part][order]
            distance = (place.double() - mark.double()).norm(dim=2) / math.hypot(*peaks.image_size)
            is_silent = strength <= 0
            weight = (~is_silent).double() if drop_silent else torch.ones_like(distance)
            number = weight.sum(dim=0)
            mean = (weight * distance).sum(dim=0) / number
            variance = (weight * (distance - mean) ** 2).sum(dim=0) / (number - 1)
            deviations[index, :, part] = torch.where(number > 1, variance, torch.nan).sqrt().float()
            counts[index, :, part] = number.float()
            silent, used = silent + float((is_silent * weight).sum()), used + float(number.sum())
    return LocationInstability(deviations, counts.long(), silent / max(used, 1.0))


def peak_places(
    maps: Tensor, centre_y: Tensor, centre_x: Tensor, *, channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """The largest value of each map and the place it stands for; a plateau stands for its centre, see ``peaks.peak``.

    Args:
        maps: [images, filters, height, width], or [images, height, width, filters].
        centre_y: Receptive-field centre of each row [height], see ``measuring.receptive_field``.
        centre_x: Receptive-field centre of each column [width].
        channels_last: Whether the filters are the last dimension.

    Returns:
        Strength [images, filters] and place (x, y) [images, filters, 2].

    Example:
        >>> centres = torch.tensor([8.0, 24.0])
        >>> peak_places(torch.tensor([[[[0.0, 2.0], [1.0, 0.0]]]]), centres, centres)
        (tensor([[2.]]), tensor([[[24.,  8.]]]))
    """
    maps = maps.permute(0, 3, 1, 2) if channels_last else maps
    index = peak(maps)
    row, column = index // maps.shape[3], index % maps.shape[3]
    return maps.amax(dim=(2, 3)), torch.stack([centre_x.to(maps.device)[column], centre_y.to(maps.device)[row]], dim=-1)


def _check(peaks: Peaks, landmarks: Tensor, top: int) -> None:
    images, filters = peaks.strength.shape
    if peaks.place.shape != (images, filters, 2) or peaks.targets.shape != (images,):
        raise ValueError(
            f"expected place [{images}, {filters}, 2] and targets [{images}], but found {list(peaks.place.shape)} and "
            f"{list(peaks.targets.shape)}."
        )
    if landmarks.ndim != 3 or landmarks.shape[0] != images or landmarks.shape[2] != 2:
        raise ValueError(
            f"expected landmarks [{images}, landmarks, 2], one row per image, but found {list(landmarks.shape)}; "
            "put the annotations in the loader's order with Annotations.select(dataset.filenames())."
        )
    if top < 2:
        raise ValueError(f"top must be at least 2 images (a deviation needs two), but is {top}.")
