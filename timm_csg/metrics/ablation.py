"""What happens to each class when the filters of one class are removed, or when only these are kept.

The authors close filters at test time and watch the classes disappear (Liang et al., ECCV 2020, section 4); a model
whose filters have owners loses exactly the class whose filters are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.metrics._model import evaluating, is_channels_last


class Ablation(NamedTuple):
    """Accuracies of the standard path, no unit, NaN for classes without samples.

    Attributes:
        before: Accuracy of each class with all filters [classes].
        after: Accuracy of each class (column) without the filters of a class (row), or with these alone
            [classes, classes].
    """

    before: Tensor
    after: Tensor

    @property
    def own(self) -> float:
        """Mean accuracy of a class without its own filters; near 0 if nobody else can stand in for them.

        With ``keep_only``: with its own filters alone; near its accuracy before if they are all it needs.
        """
        return float(self.after.diagonal().nanmean())

    @property
    def others(self) -> float:
        """Mean accuracy of the classes whose filters were left; unchanged if filters have one owner each.

        With ``keep_only``: of the classes whose filters were removed; near 0 then.
        """
        off_diagonal = ~torch.eye(len(self.after), dtype=torch.bool)
        return float(self.after[off_diagonal].nanmean())


@torch.no_grad()
def ablate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    filter_owners: Tensor,
    num_classes: int,
    *,
    keep_only: bool = False,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ablation:
    """Accuracy of every class before and after setting one class's filters to zero, for each class in turn.

    One backbone pass for each batch and one head pass for each class.

    Args:
        model: A plain or differentiated timm classifier; its modes are left as found.
        loader: Yields (images, class indices).
        filter_owners: The class that owns each filter, integers [filters]: ``owners(gate)`` or
            ``owners(mutual_information)``. Or which filters are each class's, bool [classes, filters]: ``gate > 0.5``,
            or ``top_filters``, with which every class and model loses equally many.
        num_classes: Number of classes.
        keep_only: Set all filters but those of the class to zero instead.
        amp_dtype: Autocast dtype; None: no autocast.
        progress: Called with the number of images after each batch.

    Returns:
        The accuracies.

    Raises:
        ValueError: If the owners do not fit the classes or the filters.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
        >>> ablate(model, loader, torch.arange(96) % 2, num_classes=2).after.shape
        torch.Size([2, 2])
    """
    timm_model: Any = model  # its methods are not in nn.Module's type
    device = next(model.parameters()).device
    own = _own_filters(filter_owners, num_classes).to(device)
    kept = torch.cat([torch.ones_like(own[:1]), own if keep_only else ~own])  # [all filters, then each class; filters]
    correct = torch.zeros(num_classes + 1, num_classes, dtype=torch.float64)
    count = torch.zeros(num_classes, dtype=torch.float64)
    with evaluating(model):
        for images, targets in loader:
            targets = targets.cpu()
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features = timm_model.forward_features(images.to(device))
                in_channels = features.ndim == 4 and not is_channels_last(model)
                if kept.shape[1] != features.shape[1 if in_channels else -1]:
                    raise ValueError(
                        f"the owners are of {kept.shape[1]} filters, but the stage has "
                        f"{features.shape[1 if in_channels else -1]}; pass those of the same model."
                    )
                masks = kept[:, :, None, None] if in_channels else kept
                chosen = [timm_model.forward_head(features * mask.to(features.dtype)).argmax(dim=1) for mask in masks]
            hits = [(classes.cpu() == targets).double() for classes in chosen]
            count += torch.bincount(targets, minlength=num_classes)
            for row, hit in zip(correct, hits, strict=True):
                row += torch.bincount(targets, weights=hit, minlength=num_classes)
            if progress is not None:
                progress(len(targets))
    accuracies = correct / count
    return Ablation(before=accuracies[0], after=accuracies[1:])


def _own_filters(filter_owners: Tensor, num_classes: int) -> Tensor:
    """Bool [classes, filters]."""
    if filter_owners.dtype == torch.bool and filter_owners.ndim == 2:
        if len(filter_owners) != num_classes:
            raise ValueError(f"there are {num_classes} classes, but filter_owners has {len(filter_owners)} rows.")
        return filter_owners
    if filter_owners.ndim != 1 or filter_owners.is_floating_point() or filter_owners.dtype == torch.bool:
        raise ValueError(
            "filter_owners must be class indices [filters] or bool [classes, filters], but is "
            f"{filter_owners.dtype} {list(filter_owners.shape)}; pass owners(gate) or gate > 0.5."
        )
    return filter_owners.cpu()[None] == torch.arange(num_classes)[:, None]


def top_filters(class_filter_matrix: Tensor, count: int | Sequence[int]) -> Tensor:
    """The filters that serve or tell about each class most: so many for each class, whoever owns them.

    For ``ablate``: a standard model's filters ranked by mutual information, as many for each class as a gated model's
    class owns (``filters_per_class(gate).tolist()``), so that both lose the same number. A filter can be in several
    classes' rows.

    Args:
        class_filter_matrix: Gate or mutual information [classes, filters].
        count: Filters for each class, one number or one per class.

    Returns:
        Bool [classes, filters]; the first filters where several tie.

    Example:
        >>> top_filters(torch.tensor([[0.3, 0.1, 0.2], [0.0, 0.3, 0.1]]), [2, 1])
        tensor([[ True, False,  True],
                [False,  True, False]])
    """
    num_classes, num_filters = class_filter_matrix.shape
    counts = torch.tensor([count] * num_classes if isinstance(count, int) else list(count))
    if len(counts) != num_classes or bool(((counts < 0) | (counts > num_filters)).any()):
        raise ValueError(
            f"count must be one number or {num_classes} numbers between 0 and {num_filters} filters, but is {count}."
        )
    order = class_filter_matrix.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_filters).expand_as(order).to(order.device))
    return rank < counts.to(order.device)[:, None]
