"""Assigned filters: every filter of the last stage belongs to a class, and is trained to know that class alone.

Ours. A binary class-filter matrix, from ``timm_csg.assign_filters``, says which filters are a class's own. Three things
follow from it:

* **Solo loss.** One filter is drawn for every class; the softmax over their standardised responses must name the
  picture's class. Each filter has to know its class by itself. A sum over many filters would be right, and its loss
  small, long before any one of them is. Relatives: the mutual-channel loss (Chang et al., 2020,
  https://arxiv.org/abs/2002.04264), which takes the maximum over a class's channels; filter dropout, whose limit this
  is; the N-pair loss (Sohn, NeurIPS 2016).
* **Gated path.** The logit of a class is the mean of its own filters' responses: no label needed.
* **Masked classifier.** After every optimizer step the classifier's weights on filters of other classes are set to 0.
  So the standard path is plain timm's, uses a class's own filters for its logit, and a class without them is gone.

A fixed assignment of features to classes, found from correlations before fine-tuning, is also what QPM has (Norrenbrock
et al., ICLR 2025), with a binary head and shared features, and without a loss on single filters.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import check_fraction
from timm_csg.mechanisms.base import Head, Mechanism, MechanismConfig, sharded_like
from timm_csg.mechanisms.blind import blind_assignment
from timm_csg.mechanisms.registry import register_mechanism
from timm_csg.mechanisms.solo import draw_table, solo_loss

_logger = logging.getLogger(__name__)
MOMENTUM, EPSILON = 0.1, 1e-6  # of the statistics, as in a batch norm; the variance of pooled responses can be small


@dataclass(frozen=True, kw_only=True)
class AssignedConfig(MechanismConfig):
    """Options of assigned filters.

    Args:
        filters_per_class: Filters that each class owns; the others serve no class and the masked classifier does not
            use them. None: all filters are shared out; with fewer filters than classes, each class gets
            ``SHARED_FILTERS`` of them, shared with as few others as possible.
        solo_weight: Weight of the solo loss.
        gated_weight: Weight of the criterion on the gated logits. 0: they are computed and measured, but not trained
            on; summed evidence is right before single filters are, so it adds nothing.
        mask_classifier: Whether the classifier may use a class's own filters only. Heads that are not pool → linear,
            with at most a norm between, have no such weights, and no such mask.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> AssignedConfig(filters_per_class=5).solo_weight
        3.0
    """

    filters_per_class: int | None = None
    solo_weight: float = 3.0
    gated_weight: float = 0.0
    mask_classifier: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("solo_weight", self.solo_weight)
        check_fraction("gated_weight", self.gated_weight)
        if self.filters_per_class is not None:
            check_fraction("filters_per_class", self.filters_per_class, low=1)
            if int(self.filters_per_class) != self.filters_per_class:
                raise ValueError(f"filters_per_class must be a whole number or None, but is {self.filters_per_class}.")
            object.__setattr__(self, "filters_per_class", int(self.filters_per_class))
        if not isinstance(self.mask_classifier, bool):
            raise ValueError(f"mask_classifier must be true or false, but is {self.mask_classifier!r}.")


@torch.no_grad()
def mask_classifier_(weight: Tensor, assignment: Tensor) -> Tensor:
    """Set a classifier's weights on filters that a class does not own to 0, in place.

    Args:
        weight: Classifier weight [classes, filters], changed in place; also the shards of ``fully_shard``.
        assignment: Whether a class owns a filter, bool [classes, filters].

    Returns:
        The same tensor.

    Example:
        >>> mask_classifier_(torch.ones(2, 2), torch.tensor([[True, False], [False, True]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    return weight.masked_fill_(sharded_like(~assignment, weight), 0)


@register_mechanism("assigned", AssignedConfig)
class AssignedFilters(Mechanism):
    """Filters that each belong to a class; see ``AssignedConfig`` and the top of this file.

    Until ``timm_csg.assign_filters`` has looked at training pictures, filters are assigned blindly, in turn: filter k
    to class k modulo the number of classes.
    """

    config: AssignedConfig
    owned: Tensor
    mean: Tensor
    variance: Tensor
    draws: Tensor
    assigned_from_data: Tensor

    def __init__(
        self, num_filters: int, num_classes: int, config: AssignedConfig, *, channels_last: bool = False
    ) -> None:
        super().__init__(num_filters, num_classes, config, channels_last=channels_last)
        if (config.filters_per_class or 1) > num_filters:
            raise ValueError(
                f"filters_per_class must be at most the stage's {num_filters} filters, but is "
                f"{config.filters_per_class}."
            )
        self.scale = nn.Parameter(torch.ones(num_filters))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        blind = blind_assignment(num_classes, num_filters, config.filters_per_class)
        self.register_buffer("owned", blind.byte())  # numbers, since averages of models cannot take booleans
        self.register_buffer("mean", torch.zeros(num_filters))
        self.register_buffer("variance", torch.ones(num_filters))
        self.register_buffer("assigned_from_data", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("draws", draw_table(blind), persistent=False)
        self.is_blind = True
        self.register_load_state_dict_post_hook(read_assignment)  # type: ignore[no-untyped-call]

    @property
    def assignment(self) -> Tensor:
        """Whether a class owns a filter, bool [classes, filters]."""
        return self.owned.bool()

    @property
    def needs_targets(self) -> bool:
        """The gated path needs no label."""
        return False

    @property
    def reads_head(self) -> bool:
        """Responses are what the head pools, and the classifier is masked."""
        return True

    @torch.no_grad()
    def assign_(self, assignment: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Take over an assignment and the statistics of the responses; what ``timm_csg.assign_filters`` calls.

        Args:
            assignment: Whether a class owns a filter, bool [classes, filters].
            mean: Of each filter's response over training pictures [filters].
            variance: Its variance [filters].

        Raises:
            ValueError: If a shape is another, a class owns no filter, or a statistic is not finite.
        """
        if assignment.shape != self.assignment.shape or assignment.dtype != torch.bool:
            raise ValueError(
                f"the assignment must be bool {list(self.assignment.shape)} [classes, filters], but is "
                f"{assignment.dtype} {list(assignment.shape)}."
            )
        without = (~assignment.any(dim=1)).nonzero()[:, 0].tolist()
        if without:
            raise ValueError(f"every class must own a filter, but class {without[0]} owns none.")
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise ValueError("means and variances of the responses must be finite; look for NaN in the features.")
        self.owned.copy_(assignment)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.assigned_from_data.fill_(1)
        read_assignment(self)

    def responses(self, features: Tensor, head: Head) -> Tensor:
        """One response per picture and filter: as the head pools it, or else the mean over places.

        Args:
            features: Of the last stage [batch, filters, height, width], channels last or tokens in the model's layout.
            head: The model's head.

        Returns:
            Responses [batch, filters], in the unit of the features.
        """
        if head.kind == "linear" and not head.pools_by_mean:
            return head.pooled(features).flatten(1)
        if features.ndim == 4 and not self.channels_last:
            return features.mean(dim=(2, 3))
        return features.flatten(1, -2).mean(dim=1)

    def evidence(self, features: Tensor, head: Head, *, update_statistics: bool = False) -> Tensor:
        """Standardised, scaled responses, as a batch norm makes them: by the batch in training, else as kept.

        Args:
            features: See ``responses``.
            head: The model's head.
            update_statistics: Whether the kept mean and variance move towards those of the batch, in training.

        Returns:
            Evidence [batch, filters] in standard deviations times the learned scale, float32 or wider.
        """
        responses = self.responses(features, head)
        responses = responses.to(torch.promote_types(responses.dtype, torch.float32))
        by_batch = self.training and len(responses) > 1
        mean, variance = self.mean.to(responses.dtype), self.variance.to(responses.dtype)  # themselves, but in float16
        is_kept = update_statistics or not by_batch
        standardised = F.batch_norm(
            responses,
            mean if is_kept else None,
            variance if is_kept else None,
            training=by_batch,
            momentum=MOMENTUM,
            eps=EPSILON,
        )
        if by_batch and update_statistics and mean.dtype != self.mean.dtype:
            self.mean.copy_(mean)
            self.variance.copy_(variance)
        return standardised * self.scale

    def gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        """Logits [batch, classes]: the mean evidence of a class's own filters, plus its bias; needs no targets."""
        evidence = self.evidence(features, head)
        own = self.owned.to(evidence.dtype)
        return F.linear(evidence, own / own.sum(dim=1, keepdim=True), self.bias.to(evidence.dtype))

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """``{"solo": ...}``, see ``solo_loss``; nothing without targets."""
        if targets is None:
            return {}
        if self.is_blind and self.training and not torch.compiler.is_compiling():
            self.is_blind = False  # say it once
            _logger.warning(
                "filters were assigned to classes blindly; call timm_csg.assign_filters(model, loader) before "
                "training, so that each class gets the filters that already respond to it"
            )
        evidence = self.evidence(features, head, update_statistics=True)
        return {"solo": solo_loss(evidence, self.draws, self.bias, self.assignment, targets)}

    def loss_weights(self) -> dict[str, float | Tensor]:
        """Those of ``"gated"`` and ``"solo"``."""
        return {"gated": self.config.gated_weight, "solo": self.config.solo_weight}

    @torch.no_grad()
    def restart_classifier_(self, head: Head) -> None:
        """Set a classifier that is masked to 0, so that training makes its weights on own filters positive.

        Args:
            head: The model's; changed in place.
        """
        if head.weight is not None and self.config.mask_classifier:
            head.own_weight().zero_()
            if head.bias is not None:
                head.bias.zero_()

    @torch.no_grad()
    def project_(self, head: Head | None = None) -> None:
        """Keep scales positive, and the classifier on a class's own filters."""
        self.scale.clamp_(min=1e-3)
        if head is not None and head.weight is not None and self.config.mask_classifier:
            mask_classifier_(head.own_weight(), self.assignment)

    def is_feasible(self, head: Head | None = None) -> bool:
        """Whether scales are positive and the classifier is masked; before the assignment it need not be."""
        return super().is_feasible(head if bool(self.assigned_from_data) else None)

    def class_filter_matrix(self) -> Tensor:
        """The assignment [classes, filters], zeros and ones."""
        return self.owned.to(self.scale.dtype)


def read_assignment(mechanism: Any, _incompatible: Any = None) -> None:
    """What follows from the buffers, after they have changed, been loaded, or been copied into an average."""
    mechanism.draws = draw_table(mechanism.assignment)
    if not mechanism.assigned_from_data.is_meta:
        mechanism.is_blind = not bool(mechanism.assigned_from_data)
