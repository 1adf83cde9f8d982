"""Several mechanisms on one model, one behind the other: ``differentiate(model, mechanism=["icnn", "csg"])``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_csg.mechanisms.base import Head, Mechanism, MechanismConfig
from timm_csg.mechanisms.registry import register_mechanism, resolve_config


@dataclass(frozen=True, kw_only=True)
class ChainConfig(MechanismConfig):
    """Options of a chain.

    Args:
        members: Names or configs of two or more mechanisms, in the order in which features pass through them.

    Raises:
        ValueError: If there are fewer than two, one is unknown, or one is itself a chain.
        TypeError: If a member is neither name nor config.

    Example:
        >>> [type(member).__name__ for member in ChainConfig(members=("icnn", "csg")).members]
        ['ICNNConfig', 'CSGConfig']
    """

    members: Sequence[Any] = ("icnn", "csg")

    def __post_init__(self) -> None:
        if isinstance(self.members, str) or not isinstance(self.members, Sequence) or len(self.members) < 2:
            raise ValueError(f"members must be two mechanisms or more, but are {self.members!r}.")
        members = tuple(_member_config(member) for member in self.members)
        object.__setattr__(self, "members", members)

    def to_dict(self) -> dict[str, Any]:
        """The members as a JSON-able dictionary of names and options."""
        members = [{"mechanism": resolve_config(member, {})[0].name, **member.to_dict()} for member in self.members]
        return {"members": members}


def _member_config(member: Any) -> MechanismConfig:
    if isinstance(member, dict):
        options = dict(member)
        name = options.pop("mechanism", None)
    else:
        name, options = member, {}
    if name == "chain" or isinstance(name, (list, tuple, ChainConfig)):
        raise ValueError("a chain cannot be a member of a chain; list all mechanisms in one.")
    return resolve_config(name, options)[1]


@register_mechanism("chain", ChainConfig)
class Chain(Mechanism):
    """Mechanisms one behind the other; see ``ChainConfig``.

    Losses keep their names unless two members have the same one; then the member's place stands before it:
    ``"0_sparsity"``.
    """

    config: ChainConfig

    def __init__(self, num_filters: int, num_classes: int, config: ChainConfig, *, channels_last: bool = False) -> None:
        super().__init__(num_filters, num_classes, config, channels_last=channels_last)
        made = []
        for member in config.members:
            mechanism_class, options = resolve_config(member, {})
            made.append(mechanism_class(num_filters, num_classes, options, channels_last=channels_last))
        if sum(member.reads_head for member in made) > 1:
            raise ValueError("only one member of a chain can look into the head (assigned filters).")
        self.members = nn.ModuleList(made)
        self.acts_without_targets = any(member.acts_without_targets for member in made)

    @property
    def _ordered(self) -> list[Mechanism]:
        """In the order of the gated path: what looks into the head comes last, next to it."""
        return sorted(self.members, key=lambda member: member.reads_head)  # type: ignore[arg-type]

    @property
    def needs_targets(self) -> bool:
        """Whether a member does."""
        return any(member.needs_targets for member in self._ordered)

    @property
    def paths_differ(self) -> bool:
        """Whether a member's do."""
        return any(member.paths_differ for member in self._ordered)

    @property
    def reads_head(self) -> bool:
        """Whether a member does."""
        return any(member.reads_head for member in self._ordered)

    def check_model(self, model: Any) -> None:
        """Ask all members."""
        for member in self._ordered:
            member.check_model(model)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Features that have passed all members; without targets only those that need none."""
        for member in self._ordered:
            if targets is not None or member.acts_without_targets:
                features = member(features, targets)
        return features

    def gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        """Logits of the last member in order, on features that have passed the others."""
        *others, last = self._ordered
        for member in others:
            features = member(features, targets)
        return last.gated_logits(features, targets, head)

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """All members' terms, each on features as the members before it leave them at inference."""
        terms = {}
        for place, member in zip(self._places, self._ordered, strict=True):
            terms.update(self._named(place, member.losses(features, targets, head)))
            if member.acts_without_targets:
                features = member(features)
        return terms

    def loss_weights(self) -> dict[str, float | Tensor]:
        """Each term's own weight; ``"gated"`` of the member whose paths differ."""
        weights: dict[str, float | Tensor] = {"gated": 1.0}
        for place, member in zip(self._places, self._ordered, strict=True):
            own = member.loss_weights()
            gated = own.pop("gated")
            if member.paths_differ:
                weights["gated"] = gated
            weights.update(self._named(place, own))
        return weights

    @property
    def _places(self) -> list[int]:
        own = list(self.members)
        return [own.index(member) for member in self._ordered]

    def _named(self, place: int, terms: dict[str, Any]) -> dict[str, Any]:
        counts = Counter(name for member in self._ordered for name in member.loss_weights())
        return {name if counts[name] == 1 else f"{place}_{name}": term for name, term in terms.items()}

    @property
    def goes_by_epochs(self) -> bool:
        """Whether a member does."""
        return any(member.goes_by_epochs for member in self._ordered)

    def set_epoch(self, epoch: int) -> None:
        """Tell all members."""
        for member in self._ordered:
            member.set_epoch(epoch)

    def project_(self, head: Head | None = None) -> None:
        """Project all members' parameters."""
        for member in self._ordered:
            member.project_(head)

    def is_feasible(self, head: Head | None = None) -> bool:
        """Whether all members are."""
        return all(member.is_feasible(head) for member in self._ordered)

    def class_filter_matrix(self) -> Tensor | None:
        """That of the last member that has one: a gate's, rather than the categories of part filters before it."""
        matrices = [member.class_filter_matrix() for member in self._ordered]
        return next((matrix for matrix in reversed(matrices) if matrix is not None), None)

    def no_weight_decay(self) -> set[str]:
        """Those of all members."""
        return {
            f"members.{place}.{name}"
            for place, member in zip(self._places, self._ordered, strict=True)
            for name in member.no_weight_decay()
        }
