"""What a mechanism is: a small module between a timm model's last stage and its head, with a config and a name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from timm_csg.checks import make_numbers_plain, nearest

HeadKind = Literal["linear", "normed", "pooled", "map"]


class Head(NamedTuple):
    """A timm model's own head, as a mechanism sees it.

    Attributes:
        kind: ``"linear"`` if the logits are ``pooled @ weight.T + bias`` with one pooled value per filter; ``"normed"``
            if there is only a norm layer between pooling and classifier, so that each weight still belongs to one
            filter; ``"pooled"`` if the head sees the map only through its spatial mean (pool → MLP → classifier);
            ``"map"`` otherwise.
        logits: timm's ``forward_head``, features → [batch, classes].
        pooled: timm's ``forward_head(pre_logits=True)``, features → [batch, filters] where ``kind`` is ``"linear"``.
        weight: Classifier weight [classes, filters] where ``kind`` is ``"linear"`` or ``"normed"``, else None.
        bias: Classifier bias [classes] or None.
        is_plain: Whether ``weight`` is the classifier's own, so that it can be changed in place; not so for LoRA and
            the like, where it is what the layer's function comes to.
        pools_by_mean: Whether ``pooled`` in eval mode, for ``"linear"``, is the mean over positions.
    """

    kind: HeadKind
    logits: Callable[[Tensor], Tensor]
    pooled: Callable[[Tensor], Tensor]
    weight: Tensor | None
    bias: Tensor | None
    pools_by_mean: bool = False
    is_plain: bool = True

    def own_weight(self) -> Tensor:
        """The classifier's weight, to be changed in place, where there is one for each class and filter.

        Raises:
            ValueError: If there is none, or it is not the classifier's own.
        """
        if self.weight is None or not self.is_plain:
            why = (
                "it is more than its weight (LoRA, pruning, weight norm, forward hooks, its own fully_shard)"
                if self.weight is not None
                else "has none"
            )
            raise ValueError(
                f"the classifier's weight cannot be set, because {why}; merge or remove what was put on it, or "
                "differentiate with mask_classifier=False."
            )
        return self.weight


def sharded_like(whole: Tensor, other: Any) -> Tensor:
    """A tensor that all processes have, cut into shards as ``fully_shard`` has cut another; the same if it has not."""
    if not hasattr(other, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor  # not in every build of torch

    shards: Tensor = DTensor.from_local(whole, other.device_mesh).redistribute(placements=other.placements)
    return shards


@dataclass(frozen=True, kw_only=True)
class MechanismConfig:
    """Options of a mechanism: frozen, validated on construction, and JSON in both directions.

    A config with a ``__post_init__`` of its own calls this one first: it makes plain numbers of NumPy's.
    """

    def __post_init__(self) -> None:
        make_numbers_plain(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MechanismConfig:
        """Build a config from ``to_dict``'s output.

        Args:
            values: Options by name; those left out keep their defaults.

        Returns:
            The config, checked.

        Raises:
            ValueError: If a key is not an option of this mechanism (the message lists the valid ones), or a value is
                out of its range.
        """
        valid = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(valid))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no option {', '.join(unknown)}; its options are {', '.join(valid)}."
                f"{nearest(unknown[0], valid)}"
            )
        return cls(**values)


class Mechanism(nn.Module):
    """Base of all mechanisms; one module ``model.mechanism`` that sees the features on their way into timm's head.

    Args:
        num_filters: Filters of the stage.
        num_classes: Classes of the classifier.
        config: The mechanism's options.
        channels_last: Whether 4-D features are [batch, height, width, filters]; 3-D ones always hold the filters last.
    """

    acts_without_targets: bool = False
    """Whether ``forward`` changes the features at inference, when no targets are given."""
    config_class: ClassVar[type[MechanismConfig]]
    name: ClassVar[str]

    def __init__(
        self, num_filters: int, num_classes: int, config: MechanismConfig, *, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.num_filters = num_filters
        self.num_classes = num_classes
        self.config = config
        self.channels_last = channels_last

    @property
    def needs_targets(self) -> bool:
        """Whether the gated path can only be computed with targets."""
        return True

    @property
    def paths_differ(self) -> bool:
        """Whether the gated path computes anything else than the standard one; if not, both are computed once."""
        return True

    @property
    def reads_head(self) -> bool:
        """Whether ``gated_logits`` looks at more of the head than ``head.logits``; only then is the head probed."""
        return False

    def check_model(self, model: Any) -> None:
        """Raise if this mechanism cannot work on a model, before anything is changed; here it can on all.

        Args:
            model: A plain timm classifier.
        """

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Features changed as the mechanism does for these targets; here not at all.

        Args:
            features: The stage's output [batch, filters, height, width], or another layout of timm's.
            targets: Class indices [batch], soft or multi-hot targets [batch, classes], or None.

        Returns:
            Features of the same shape and layout.
        """
        return features

    def gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        """Logits of the gated path; by default timm's head on ``self(features, targets)``.

        Args:
            features: The stage's output [batch, filters, height, width], or another layout of timm's.
            targets: Class indices [batch], soft or multi-hot targets [batch, classes], or None.
            head: The model's own.

        Returns:
            Logits [batch, classes].
        """
        return head.logits(self(features, targets))

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """The mechanism's own loss terms.

        Args:
            features: The stage's output [batch, filters, height, width], or another layout of timm's.
            targets: Class indices [batch], soft or multi-hot targets [batch, classes], or None.
            head: The model's own, for terms on the classifier.

        Returns:
            Unweighted scalars by name; ``loss_weights`` has their weights.
        """
        return {}

    def loss_weights(self) -> dict[str, float | Tensor]:
        """Weight of ``"gated"``, the criterion on the gated logits, and of every name that ``losses`` returns."""
        return {"gated": 1.0}

    @property
    def goes_by_epochs(self) -> bool:
        """Whether ``set_epoch`` changes anything, so that somebody has to tell the epoch."""
        return type(self).set_epoch is not Mechanism.set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; ``TrainingMixin.losses`` calls this, also again for the same epoch.

        Args:
            epoch: Counted from 0.
        """

    def project_(self, head: Head | None = None) -> None:
        """Bring the parameters back into their feasible set, after an optimizer step.

        Args:
            head: The model's head, of which a mechanism may project the classifier's weight; None: only its own
                parameters.
        """

    def is_feasible(self, head: Head | None = None) -> bool:
        """Whether ``project_`` would leave everything as it is, but for rounding; it is not called on the model itself.

        Args:
            head: The model's, for mechanisms that also project the classifier; None: only own parameters count.

        Returns:
            True if nothing would change.
        """
        projected = copy.deepcopy(self)
        masked = None
        if head is not None:
            masked = head._replace(weight=None if head.weight is None else head.weight.detach().clone())
        with torch.no_grad():
            projected.project_(masked)
        pairs = list(zip(self.state_dict().values(), projected.state_dict().values(), strict=True))
        if head is not None and masked is not None and head.weight is not None and masked.weight is not None:
            pairs.append((head.weight.detach(), masked.weight))
        return all(torch.allclose(own, other, rtol=0, atol=1e-6) for own, other in pairs)

    def class_filter_matrix(self) -> Tensor | None:
        """How much each filter serves each class, [classes, filters] in [0, 1], detached; None where undefined."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that weight decay must leave alone; all of them unless overridden."""
        return {name for name, _ in self.named_parameters()}

    def along_filters(self, rows: Tensor, features: Tensor) -> Tensor:
        """Numbers by filter, shaped to multiply features of any layout.

        Args:
            rows: [batch or 1, filters].
            features: [batch, filters, height, width], or another layout of timm's.

        Returns:
            The same numbers with ones as the other sizes [batch or 1, filters, 1, 1] (or the like), in the features'
            dtype.
        """
        rows = rows.to(features.dtype)
        if features.ndim == 4 and not self.channels_last:
            return rows[:, :, None, None]
        return rows.reshape(rows.shape[0], *[1] * (features.ndim - 2), rows.shape[1])

    def extra_repr(self) -> str:
        """What ``repr`` shows in the brackets: number of filters and classes, and the config."""
        return f"filters={self.num_filters}, classes={self.num_classes}, {self.config}"
