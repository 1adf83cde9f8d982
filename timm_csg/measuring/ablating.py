"""Removing the filters of each class in turn from a model that runs; ``metrics.ablate_linear`` needs no model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from timm_csg.head import find_linear_head, pooled_responses
from timm_csg.metrics.ablation import Ablation, Tally, hits_of_product
from timm_csg.running import checked_batches, measured
from timm_csg.stage import is_channels_last

_logger = logging.getLogger(__name__)
_SLOW = 60.0  # seconds of head passes that are announced


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

    One backbone pass for each batch. Where the head is linear, so that the responses' contributions add up to the
    logits, one matrix product serves all classes: the logits minus what the removed filters add, in float64. Any other
    head (layers between pooling and classifier, a mechanism that acts at inference) runs once for each class that owns
    filters; a warning says how long that takes if it is more than a minute. Memory: 8 x classes² bytes for the result.

    Args:
        model: A plain or differentiated timm classifier; its modes are left as found.
        loader: Yields (images, class indices).
        filter_owners: The class that owns each filter, integers [filters]: ``metrics.owners(gate)`` or
            ``metrics.owners(mutual_information)``. Or which filters are each class's, bool [classes, filters]:
            ``gate > 0.5``, or ``metrics.top_filters``, with which every class and model loses equally many.
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
    tally = Tally(filter_owners, num_classes, keep_only)
    linear, is_first = None, True
    with measured(model):
        device = next(model.parameters()).device
        kept = tally.kept.to(device)
        for images, targets in checked_batches(model, loader, progress):
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features = timm_model.forward_features(images)
                width = features.shape[1 if features.ndim == 4 and not is_channels_last(model) else -1]
                if kept.shape[1] != width:
                    raise ValueError(
                        f"the owners are of {kept.shape[1]} filters, but the stage has {width}; pass those of the same "
                        "model."
                    )
                if is_first:
                    linear = find_linear_head(model, features)
                if linear is None:
                    batches = (len(loader) if isinstance(loader, Sized) else 1) if is_first else 0
                    hits = _hits_of_passes(timm_model, features, targets, kept, batches)
            if linear is not None:
                hits = hits_of_product(pooled_responses(model, features), targets, *linear, kept)
            tally.add(hits, targets)
            is_first = False
    return tally.result()


def _hits_of_passes(model: Any, features: Tensor, targets: Tensor, kept: Tensor, batches: int) -> Tensor:
    """The same by a pass of the head for each set; for a first batch, of so many, a warning if this will take long."""
    masks = kept[:, :, None, None] if features.ndim == 4 and not is_channels_last(model) else kept
    start, hits = time.perf_counter(), []
    for number, mask in enumerate(masks):
        hits.append((model.forward_head(features * mask.to(features.dtype)).argmax(dim=1) == targets).cpu())
        seconds = (time.perf_counter() - start) / (number + 1) * len(masks) * batches
        if number == min(3, len(masks) - 1) and seconds > _SLOW:
            _logger.warning(
                "the head of %s is not linear, so removing filters takes %d passes of it for each batch: about %.0f "
                "minutes in all; pass fewer images if that is too long.",
                type(model).__name__,
                len(masks),
                seconds / 60,
            )
    return torch.stack(hits)
