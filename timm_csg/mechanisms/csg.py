"""Class-specific gates: Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
Class-specific Filters", ECCV 2020 (https://arxiv.org/abs/2007.08194).

A gate [classes, filters] with entries in [0, 1] says how much each filter of the last conv stage serves each class. The
standard path ignores it; the gated path sees the features through the row of the true label, so it exists in training
only, and a sparsity term leaves every filter to about one class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import check_choice, check_fraction
from timm_csg.mechanisms.base import Head, Mechanism, MechanismConfig
from timm_csg.mechanisms.registry import register_mechanism
from timm_csg.mechanisms.targets import target_rows


@dataclass(frozen=True, kw_only=True)
class CSGConfig(MechanismConfig):
    """Options of the class-specific gate.

    Args:
        gated_weight: λ1, weight of the criterion on the gated logits.
        sparsity_weight: λ2, weight of the sparsity term; also the rate at which it pulls on each gate entry.
        sparsity_norm: ψ, ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        classes_per_filter: The bound g per filter: the term is zero once ‖G‖₁ ≤ ``classes_per_filter`` × filters. At
            least 1, since a filter's largest entry is 1. None: the authors' 0.2 × classes, but not less than 1.
        initial_gate: Start value of every entry.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> CSGConfig(classes_per_filter=1.2).sparsity_weight
        0.001
    """

    gated_weight: float = 1.0
    sparsity_weight: float = 1e-3
    sparsity_norm: Literal["l1", "l2", "smooth_l1"] = "l1"
    classes_per_filter: float | None = None
    initial_gate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sparsity_norm", self.sparsity_norm, ("l1", "l2", "smooth_l1"))
        check_fraction("gated_weight", self.gated_weight)
        check_fraction("sparsity_weight", self.sparsity_weight)
        check_fraction("initial_gate", self.initial_gate, high=1.0)
        if self.classes_per_filter is not None:
            check_fraction("classes_per_filter", self.classes_per_filter, low=1.0)


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


@register_mechanism("csg", CSGConfig)
class ClassSpecificGate(Mechanism):
    """The gate of Liang et al., ECCV 2020; see ``CSGConfig``."""

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

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """``{"sparsity": ...}``, see ``sparsity_loss``."""
        return {"sparsity": sparsity_loss(self.gate, self.classes_per_filter, self.config.sparsity_norm)}

    def loss_weights(self) -> dict[str, float | Tensor]:
        """λ1 for ``"gated"`` and λ2 for ``"sparsity"``."""
        return {"gated": self.config.gated_weight, "sparsity": self.config.sparsity_weight}

    def project_(self, head: Head | None = None) -> None:
        """Divide each filter by its largest class and clip to [0, 1]; see ``project_gate_``."""
        project_gate_(self.gate)

    def is_feasible(self, head: Head | None = None) -> bool:
        """Whether the gate is projected, or still as ``differentiate`` made it."""
        return bool((self.gate == self.config.initial_gate).all()) or super().is_feasible()

    def class_filter_matrix(self) -> Tensor:
        """The gate [classes, filters], in [0, 1]."""
        return self.gate.detach().clamp(0, 1)
