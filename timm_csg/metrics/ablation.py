"""What happens to each class when the filters of one class are removed.

The authors close filters at test time and watch the classes disappear (Liang et al., ECCV 2020, section 4); a model
whose filters have owners loses exactly the class whose filters are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.metrics._model import evaluating, is_channels_last


class Ablation(NamedTuple):
    """Accuracies of the standard path, no unit, NaN for classes without samples.

    Attributes:
        before: Accuracy of each class with all filters [classes].
        after: Accuracy of each class (column) without the filters of a class (row) [classes, classes].
    """

    before: Tensor
    after: Tensor

    @property
    def own(self) -> float:
        """Mean accuracy of a class without its own filters; near 0 if nobody else can stand in for them."""
        return float(self.after.diagonal().nanmean())

    @property
    def others(self) -> float:
        """Mean accuracy of the classes whose filters were left; unchanged if filters have one owner each."""
        off_diagonal = ~torch.eye(len(self.after), dtype=torch.bool)
        return float(self.after[off_diagonal].nanmean())


@torch.no_grad()
def ablate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    filter_owners: Tensor,
    num_classes: int,
    *,
    amp_dtype: torch.dtype | None = None,
) -> Ablation:
    """Accuracy of every class before and after setting one class's filters to zero, for each class in turn.

    One backbone pass for each batch and one head pass for each class.

    Args:
        model: A plain or differentiated timm classifier; its modes are left as found.
        loader: Yields (images, class indices).
        filter_owners: The class that owns each filter [filters]: ``owners(gate)`` or ``owners(mutual_information)``.
        num_classes: Number of classes.
        amp_dtype: Autocast dtype; None: no autocast.

    Returns:
        The accuracies.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
        >>> ablate(model, loader, torch.arange(96) % 2, num_classes=2).after.shape
        torch.Size([2, 2])
    """
    timm_model: Any = model  # its methods are not in nn.Module's type
    device = next(model.parameters()).device
    kept = (filter_owners[None] != torch.arange(num_classes)[:, None]).to(device)  # [removed class, filters]
    kept = torch.cat([torch.ones_like(kept[:1]), kept])
    correct = torch.zeros(num_classes + 1, num_classes, dtype=torch.float64)
    count = torch.zeros(num_classes, dtype=torch.float64)
    with evaluating(model):
        for images, targets in loader:
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features = timm_model.forward_features(images.to(device))
                in_channels = features.ndim == 4 and not is_channels_last(model)
                masks = kept[:, :, None, None] if in_channels else kept
                hits = [
                    (
                        timm_model.forward_head(features * mask.to(features.dtype)).argmax(dim=1).cpu() == targets
                    ).double()
                    for mask in masks
                ]
            count += torch.bincount(targets, minlength=num_classes)
            for row, hit in zip(correct, hits, strict=True):
                row += torch.bincount(targets, weights=hit, minlength=num_classes)
    accuracies = correct / count
    return Ablation(before=accuracies[0], after=accuracies[1:])
