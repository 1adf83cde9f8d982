"""Class-specific gates: Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
Class-specific Filters", ECCV 2020 (https://arxiv.org/abs/2007.08194).

A gate [classes, filters] with entries in [0, 1] says how much each filter of the last conv stage serves each class. The
standard path ignores it; the gated path sees the features through it, and a sparsity term leaves every filter to about
one class. Two ways to use the gate are here. ``gating="label"`` is the paper: the true label picks the row. It gives
the label away, so it exists in training only. ``gating="competitive"`` computes the logit of every class through that
class's own row, so no label is needed and the gated path also answers at inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.mechanisms.base import (
    Head,
    Mechanism,
    MechanismConfig,
    check_choice,
    check_fraction,
    register_mechanism,
)
from timm_csg.mechanisms.targets import target_rows


@dataclass(frozen=True, kw_only=True)
class CSGConfig(MechanismConfig):
    """Options of the class-specific gate.

    Args:
        gating: ``"label"`` (the paper) or ``"competitive"`` (every class through its own row, no label needed).
        evidence: What a filter says for a class on the competitive path. ``"any"``: response × classifier weight ×
            gate. ``"positive"``: the same with relu(weight), so that a filter can only speak for its classes, never
            against others. ``"gate"``: response × gate, so that the logit of a class is the sum of its filters (times a
            constant, plus the bias).
        evidence_scale: For ``evidence="gate"``: the sum is multiplied by ``evidence_scale`` × classes / filters, so
            that logits have one scale for every width. 6.4 is filters / classes of the ResNet20 on CIFAR-10 that it was
            found with, so there it is the plain sum.
        filter_dropout: Share of the responses dropped from the competitive path in training. A filter that cannot count
            on the others has to know its class by itself.
        gated_weight: λ1, weight of the criterion on the gated logits.
        sparsity_weight: λ2, weight of the sparsity term; also the rate at which it pulls on each gate entry.
        sparsity_norm: ψ, ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        classes_per_filter: The bound g per filter: the term is zero once ‖G‖₁ ≤ ``classes_per_filter`` × filters. At
            least 1, since a filter's largest entry is 1. None: the authors' 0.2 × classes, but not less than 1.
        foreign_weight: Weight of ``foreign_loss``, which keeps the standard path's classifier from using filters of
            other classes. Heads that are not pool → linear have no such weights, and no such term.
        initial_gate: Start value of every entry.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> CSGConfig(classes_per_filter=1.2).sparsity_weight
        0.001
    """

    gating: Literal["label", "competitive"] = "label"
    evidence: Literal["any", "positive", "gate"] = "any"
    evidence_scale: float = 6.4
    filter_dropout: float = 0.0
    gated_weight: float = 1.0
    sparsity_weight: float = 1e-3
    sparsity_norm: Literal["l1", "l2", "smooth_l1"] = "l1"
    classes_per_filter: float | None = None
    foreign_weight: float = 0.0
    initial_gate: float = 0.5

    def __post_init__(self) -> None:
        check_choice("gating", self.gating, ("label", "competitive"))
        check_choice("evidence", self.evidence, ("any", "positive", "gate"))
        check_choice("sparsity_norm", self.sparsity_norm, ("l1", "l2", "smooth_l1"))
        check_fraction("gated_weight", self.gated_weight)
        check_fraction("sparsity_weight", self.sparsity_weight)
        check_fraction("foreign_weight", self.foreign_weight)
        check_fraction("initial_gate", self.initial_gate, high=1.0)
        check_fraction("evidence_scale", self.evidence_scale)
        check_fraction("filter_dropout", self.filter_dropout, high=0.99)
        if self.classes_per_filter is not None:
            check_fraction("classes_per_filter", self.classes_per_filter, low=1.0)
        if self.gating == "label" and (self.evidence != "any" or self.filter_dropout):
            raise ValueError(
                "evidence and filter_dropout belong to gating='competitive'; label gating keeps the head as is."
            )


def sparsity_loss(gate: Tensor, classes_per_filter: float, norm: str = "l1") -> Tensor:
    """The sparsity term ψ(relu(‖G‖₁ − g)) of the paper with g = ``classes_per_filter`` × filters.

    ψ acts on the mean excess per filter and the result is multiplied by the number of filters. For ``"l1"`` that is the
    paper's term exactly; for the others it keeps the pull on a single entry the same whatever the size of the gate.

    Args:
        gate: Gate matrix [classes, filters].
        classes_per_filter: Allowed sum of a filter's entries, on average over filters.
        norm: ``"l1"`` (ψ(x) = x), ``"l2"`` (x²) or ``"smooth_l1"`` (x²/2 below 1, x − 1/2 above).

    Returns:
        Scalar, 0 or more, no unit.

    Example:
        >>> sparsity_loss(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), classes_per_filter=1.0)
        tensor(1.)
    """
    num_filters = gate.shape[1]
    excess = F.relu(gate.abs().sum() / num_filters - classes_per_filter)
    if norm == "l2":
        excess = excess.square()
    elif norm == "smooth_l1":
        excess = F.smooth_l1_loss(excess, torch.zeros_like(excess))
    return num_filters * excess


def foreign_loss(weight: Tensor, gate: Tensor) -> Tensor:
    """Squared classifier weights on filters of other classes: Σ (W (1 − G))², a weight decay that spares owned filters.

    Ours, not the paper's. The gate takes no gradient from it.

    Args:
        weight: Classifier weight [classes, filters].
        gate: Gate matrix [classes, filters].

    Returns:
        Scalar, 0 or more, no unit.

    Example:
        >>> foreign_loss(torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 0.5]]))
        tensor(1.)
    """
    return (weight * (1 - gate.detach())).square().sum()


@torch.no_grad()
def project_gate_(gate: Tensor) -> Tensor:
    """Bring a gate back into its feasible set, in place: every filter's largest entry 1, all entries in [0, 1].

    The authors' step: divide each filter by its maximum over classes, then clip. Guarded: NaN counts as 0, and a filter
    without a positive entry keeps only its least negative classes (all of them where it cannot tell).

    Args:
        gate: Gate matrix [classes, filters], changed in place.

    Returns:
        The same tensor.

    Example:
        >>> project_gate_(torch.tensor([[0.5, 0.1], [0.25, -0.2]]))
        tensor([[1.0000, 1.0000],
                [0.5000, 0.0000]])
    """
    gate.nan_to_num_(nan=0.0)
    peak = gate.amax(dim=0, keepdim=True)
    rescued = (gate == peak).to(gate.dtype)
    gate.copy_(torch.where(peak > 0, gate / peak, rescued)).clamp_(0, 1)
    return gate


def competitive_logits(features: Tensor, gate: Tensor, head: Head, mechanism: Mechanism) -> Tensor:
    """Logits of heads that are not pool → linear: class c's logit from the features seen through row c.

    Classes go through the head in chunks, one call each; a head that only sees the spatial mean gets the mean.

    Args:
        features: The stage's features.
        gate: Gate matrix [classes, filters].
        head: timm's head.
        mechanism: Knows the layout of the features.

    Returns:
        Logits [batch, classes].
    """
    if head.kind == "pooled" and features.ndim == 4:
        features = features.mean(dim=(1, 2) if mechanism.channels_last else (2, 3), keepdim=True)
    num_classes, batch = gate.shape[0], features.shape[0]
    chunk = max(1, min(num_classes, 2**24 // max(1, features.numel())))
    columns = []
    for start in range(0, num_classes, chunk):
        rows = gate[start : start + chunk]
        seen = features[None] * mechanism.along_filters(rows, features)[:, None]
        logits = head.logits(seen.flatten(0, 1)).reshape(rows.shape[0], batch, num_classes)
        own = torch.arange(start, start + rows.shape[0], device=logits.device)
        columns.append(logits.gather(2, own[:, None, None].expand(-1, batch, 1)).squeeze(2))
    return torch.cat(columns).T


@register_mechanism("csg", CSGConfig)
class ClassSpecificGate(Mechanism):
    """The gate of Liang et al., ECCV 2020, with the paper's label gating or competitive gating; see ``CSGConfig``."""

    config: CSGConfig

    def __init__(self, num_filters: int, num_classes: int, config: CSGConfig, *, channels_last: bool = False) -> None:
        super().__init__(num_filters, num_classes, config, channels_last=channels_last)
        if config.classes_per_filter is not None and config.classes_per_filter > num_classes:
            raise ValueError(
                f"classes_per_filter must lie between 1 and the {num_classes} classes, but is "
                f"{config.classes_per_filter}."
            )
        self.gate = nn.Parameter(torch.full((num_classes, num_filters), float(config.initial_gate)))

    @property
    def needs_targets(self) -> bool:
        """Label gating needs them; competitive gating does not."""
        return self.config.gating == "label"

    @property
    def reads_head(self) -> bool:
        """Competitive gating and the foreign term look at the classifier's weights."""
        return self.config.gating == "competitive" or self.config.foreign_weight > 0

    @property
    def classes_per_filter(self) -> float:
        """The bound in force: the configured one, or the authors' 0.2 × classes (at least 1)."""
        configured = self.config.classes_per_filter
        return max(1.0, 0.2 * self.num_classes) if configured is None else configured

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Features seen through the rows of the targets' classes; unchanged without targets."""
        if targets is None:
            return features
        rows = target_rows(self.gate, targets)
        if rows.shape[0] != features.shape[0]:
            raise ValueError(f"there are {features.shape[0]} images but {rows.shape[0]} targets.")
        return features * self.along_filters(rows, features)

    def gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        """Logits [batch, classes] of the gated path."""
        if self.config.gating == "label":
            return head.logits(self(features, targets))
        evidence = self.config.evidence
        if evidence == "gate" or head.weight is not None:
            pooled = F.dropout(self._pooled(features, head), self.config.filter_dropout, self.training)
            says: Tensor | float = self.config.evidence_scale * self.num_classes / self.num_filters
            if evidence != "gate" and head.weight is not None:
                says = F.relu(head.weight) if evidence == "positive" else head.weight
            return F.linear(pooled, self.gate * says, head.bias)
        if evidence == "positive":
            raise ValueError(
                "evidence='positive' takes relu of the classifier's weights and so needs a pool → linear head, but "
                "this model has further layers between pooling and classifier; use evidence='gate' or 'any'."
            )
        if self.training and self.config.filter_dropout:
            keep = F.dropout(features.new_ones(features.shape[0], self.num_filters), self.config.filter_dropout)
            features = features * self.along_filters(keep, features)
        return competitive_logits(features, self.gate, head, self)

    def _pooled(self, features: Tensor, head: Head) -> Tensor:
        """One response per image and filter: as the head pools, or else the mean over positions."""
        if head.kind == "linear":
            return head.pooled(features).flatten(1)
        if features.ndim == 4 and not self.channels_last:
            return features.mean(dim=(2, 3))
        return features.flatten(1, -2).mean(dim=1)

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """``{"sparsity": ...}``, see ``sparsity_loss``; with a ``foreign_weight`` also ``"foreign"``."""
        terms = {"sparsity": sparsity_loss(self.gate, self.classes_per_filter, self.config.sparsity_norm)}
        if self.config.foreign_weight and head.weight is not None:
            terms["foreign"] = foreign_loss(head.weight, self.gate)
        return terms

    def loss_weights(self) -> dict[str, float | Tensor]:
        """λ1 for ``"gated"``, λ2 for ``"sparsity"``, and that of ``"foreign"``."""
        return {
            "gated": self.config.gated_weight,
            "sparsity": self.config.sparsity_weight,
            "foreign": self.config.foreign_weight,
        }

    def project_(self, head: Head | None = None) -> None:
        """Divide each filter by its largest class and clip to [0, 1]; see ``project_gate_``."""
        project_gate_(self.gate)

    def class_filter_matrix(self) -> Tensor:
        """The gate [classes, filters], in [0, 1]."""
        return self.gate.detach().clamp(0, 1)
