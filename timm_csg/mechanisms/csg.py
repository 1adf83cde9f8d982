"""Class-specific gates: Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
Class-specific Filters", ECCV 2020 (https://arxiv.org/abs/2007.08194).

A gate [classes, filters] with entries in [0, 1] says how much each filter of the last conv stage serves each class. The
standard path ignores it; the gated path sees the features through it, and a sparsity term leaves every filter to about one
class. Two ways to use the gate are here. ``gating="label"`` is the paper: the true label picks the row. It gives the label
away, so it exists in training only. ``gating="competitive"`` computes the logit of every class through that class's own row,
so no label is needed and the gated path also answers at inference.
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
    describe,
    register_mechanism,
)


@dataclass(frozen=True, kw_only=True)
class CSGConfig(MechanismConfig):
    """Options of the class-specific gate.

    Args:
        gating: ``"label"`` (the paper) or ``"competitive"`` (every class through its own row, no label needed).
        evidence: ``"any"``, or ``"positive"``: the gated path takes relu(classifier weight), so that a filter can only speak
            for its classes, never against others. Competitive gating with a pool → linear head only.
        gated_weight: λ1, weight of the criterion on the gated logits.
        sparsity_weight: λ2, weight of the sparsity term; also the rate at which it pulls on each gate entry.
        sparsity_norm: ψ, ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        classes_per_filter: The bound g per filter: the term is zero once ‖G‖₁ ≤ ``classes_per_filter`` × filters. At least
            1, since a filter's largest entry is 1. None: the authors' 0.2 × classes, but not less than 1.
        initial_gate: Start value of every entry.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> CSGConfig(classes_per_filter=1.2).sparsity_weight
        0.001
    """

    gating: Literal["label", "competitive"] = "label"
    evidence: Literal["any", "positive"] = "any"
    gated_weight: float = 1.0
    sparsity_weight: float = 1e-3
    sparsity_norm: Literal["l1", "l2", "smooth_l1"] = "l1"
    classes_per_filter: float | None = None
    initial_gate: float = 0.5

    def __post_init__(self) -> None:
        check_choice("gating", self.gating, ("label", "competitive"))
        check_choice("evidence", self.evidence, ("any", "positive"))
        check_choice("sparsity_norm", self.sparsity_norm, ("l1", "l2", "smooth_l1"))
        check_fraction("gated_weight", self.gated_weight)
        check_fraction("sparsity_weight", self.sparsity_weight)
        check_fraction("initial_gate", self.initial_gate, high=1.0)
        if self.classes_per_filter is not None:
            check_fraction("classes_per_filter", self.classes_per_filter, low=1.0)
        if self.evidence == "positive" and self.gating == "label":
            raise ValueError(
                "evidence='positive' belongs to gating='competitive'; label gating keeps the classifier as is."
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


def gate_rows(gate: Tensor, targets: Tensor) -> Tensor:
    """One row of the gate per image, for any of the three kinds of targets.

    Args:
        gate: Gate matrix [classes, filters].
        targets: Class indices [batch]; or [batch, classes]: floating-point rows that sum to 1 are soft targets (mixup, label
            smoothing) and mix the rows; rows of zeros and ones with another sum are multi-hot and take the largest entry
            over the classes present.

    Returns:
        Rows [batch, filters].

    Raises:
        TypeError: If targets are not an integer, boolean or floating-point tensor.
        ValueError: If their shape or values fit none of the three kinds.

    Example:
        >>> gate = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
        >>> gate_rows(gate, torch.tensor([1]))
        tensor([[0.5000, 1.0000]])
        >>> gate_rows(gate, torch.tensor([[0.5, 0.5]]))
        tensor([[0.7500, 0.5000]])
        >>> gate_rows(gate, torch.tensor([[1, 1]]))
        tensor([[1., 1.]])
    """
    num_classes = gate.shape[0]
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise TypeError(
            f"targets must be a tensor of class indices, soft targets or multi-hot rows, but are {type(targets)}."
        )
    if targets.ndim == 1 and not targets.is_floating_point() and targets.dtype != torch.bool:
        _check_indices(targets, num_classes)
        return F.embedding(targets.long(), gate)
    if targets.ndim != 2 or targets.shape[1] != num_classes:
        raise ValueError(
            f"targets must be integer class indices [batch] or rows [batch, {num_classes}], but are {describe(targets)}."
        )
    weights = targets.to(gate.dtype)
    if not targets.is_floating_point():
        _check_rows(weights, multi_hot=torch.ones_like(weights[:, 0], dtype=torch.bool))
        return _strongest_row(gate, weights)
    multi_hot = (weights.sum(dim=1) - 1).abs() > 1e-2
    if not torch.compiler.is_compiling():
        _check_rows(weights, multi_hot)
        if not multi_hot.any():
            return weights @ gate
    return torch.where(multi_hot[:, None], _strongest_row(gate, weights), weights @ gate)


def _check_indices(targets: Tensor, num_classes: int) -> None:
    """Check the range where looking costs nothing; on an accelerator the embedding kernel asserts the same."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0:
        raise ValueError(f"targets must be class indices from 0 to {num_classes - 1}, but the smallest is {low}.")
    if high >= num_classes:
        raise ValueError(
            f"targets must hold class indices below {num_classes}, but the largest is {high}; "
            f"pass num_classes={high + 1} to differentiate(), or relabel the data set."
        )


def _check_rows(weights: Tensor, multi_hot: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(
            f"rows of targets must lie in [0, 1], but reach from {weights.min():g} to {weights.max():g}; "
            "pass probabilities (soft targets) or zeros and ones (multi-hot), not logits."
        )
    odd = multi_hot & ((weights != 0) & (weights != 1)).any(dim=1)
    if odd.any():
        row = int(odd.nonzero()[0])
        raise ValueError(
            f"row {row} of targets sums to {float(weights[row].sum()):g}: neither soft targets (a sum of 1) nor multi-hot "
            "(zeros and ones only); normalise the row, or pass the classes present as ones."
        )


def _strongest_row(gate: Tensor, weights: Tensor) -> Tensor:
    """Largest gate entry over the classes present, one class at a time: [batch, filters] without a 3-D intermediate."""
    rows = weights.new_zeros(weights.shape[0], gate.shape[1])
    for present, row in zip(weights.unbind(1), gate, strict=True):
        rows = torch.maximum(rows, present[:, None] * row)
    return rows


def competitive_logits(features: Tensor, gate: Tensor, head: Head, mechanism: Mechanism) -> Tensor:
    """Logits of heads that are not pool → linear: class c's logit from the features seen through row c.

    All classes go through the head in one call each chunk of rows; a head that only sees the spatial mean gets the mean.

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
        logits = head.logits(seen.flatten(0, 1)).unflatten(0, (rows.shape[0], batch))
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
                f"classes_per_filter must lie between 1 and the {num_classes} classes, but is {config.classes_per_filter}."
            )
        self.gate = nn.Parameter(torch.full((num_classes, num_filters), float(config.initial_gate)))

    @property
    def needs_targets(self) -> bool:
        """Label gating needs them; competitive gating does not."""
        return self.config.gating == "label"

    @property
    def reads_head(self) -> bool:
        """Competitive gating multiplies the classifier's weights."""
        return self.config.gating == "competitive"

    @property
    def classes_per_filter(self) -> float:
        """The bound in force: the configured one, or the authors' 0.2 × classes (at least 1)."""
        configured = self.config.classes_per_filter
        return max(1.0, 0.2 * self.num_classes) if configured is None else configured

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Features seen through the rows of the targets' classes; unchanged without targets."""
        if targets is None:
            return features
        rows = gate_rows(self.gate, targets)
        if rows.shape[0] != features.shape[0]:
            raise ValueError(f"there are {features.shape[0]} images but {rows.shape[0]} targets.")
        return features * self.along_filters(rows, features)

    def gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        """Logits [batch, classes] of the gated path."""
        if self.config.gating == "label":
            return head.logits(self(features, targets))
        if head.weight is None:
            if self.config.evidence == "positive":
                raise ValueError(
                    "evidence='positive' takes relu of the classifier's weights and so needs a pool → linear head, but this "
                    "model has further layers between pooling and classifier; use evidence='any'."
                )
            return competitive_logits(features, self.gate, head, self)
        weight = F.relu(head.weight) if self.config.evidence == "positive" else head.weight
        return F.linear(head.pooled(features).flatten(1), weight * self.gate, head.bias)

    def losses(self, features: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """``{"sparsity": ...}``, see ``sparsity_loss``."""
        return {"sparsity": sparsity_loss(self.gate, self.classes_per_filter, self.config.sparsity_norm)}

    def loss_weights(self) -> dict[str, float]:
        """λ1 for ``"gated"`` and λ2 for ``"sparsity"``."""
        return {"gated": self.config.gated_weight, "sparsity": self.config.sparsity_weight}

    def project_(self) -> None:
        """Divide each filter by its largest class and clip to [0, 1]; see ``project_gate_``."""
        project_gate_(self.gate)

    def class_filter_matrix(self) -> Tensor:
        """The gate [classes, filters], in [0, 1]."""
        return self.gate.detach().clamp(0, 1)
