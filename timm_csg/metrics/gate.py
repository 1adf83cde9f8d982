"""What a class-filter matrix says: how sparse it is, who owns what, and whether the activations agree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from timm_csg.metrics.display import in_one_line


def gate_density(gate: Tensor) -> Tensor:
    """Mean entry of the gate: 1 when every filter serves every class, 1 / classes when each serves one.

    What the sparsity term of Liang et al., ECCV 2020 (https://arxiv.org/abs/2007.08194) bounds: ‖G‖₁ divided by
    classes × filters.

    Args:
        gate: Class-filter matrix [classes, filters], entries in [0, 1].

    Returns:
        Scalar in [0, 1], no unit.

    Example:
        >>> gate_density(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.5000)
    """
    return gate.abs().mean()


def owners(class_filter_matrix: Tensor) -> Tensor:
    """The class that owns each filter: the one it serves most, by gate, assignment or mutual information.

    Args:
        class_filter_matrix: Gate, assignment or mutual information [classes, filters], 0 or more.

    Returns:
        Class indices, int64 [filters]: the first one where several tie, -1 for a filter that serves none.

    Example:
        >>> owners(torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0]]))
        tensor([ 0,  1, -1])
    """
    return torch.where((class_filter_matrix > 0).any(dim=0), class_filter_matrix.argmax(dim=0), -1)


def owned_filters(class_filter_matrix: Tensor) -> Tensor:
    """Which filters are each class's own: those that serve no class more. A filter that serves none is nobody's.

    Args:
        class_filter_matrix: Gate, assignment or mutual information [classes, filters], 0 or more.

    Returns:
        Bool [classes, filters]; where a filter serves several classes equally, it is in the rows of all of them.

    Example:
        >>> owned_filters(torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0]])).int()
        tensor([[1, 0, 0],
                [0, 1, 0]], dtype=torch.int32)
    """
    return (class_filter_matrix == class_filter_matrix.amax(dim=0)) & (class_filter_matrix > 0)


def filters_per_class(gate: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Number of filters that serve each class with more than ``threshold`` of full strength.

    Args:
        gate: Class-filter matrix [classes, filters], entries in [0, 1].
        threshold: The authors' notebooks use 0.5 for "shared" and 0.95 for "owned".

    Returns:
        Counts, int64 [classes].

    Example:
        >>> filters_per_class(torch.tensor([[1.0, 0.9], [0.0, 1.0]]))
        tensor([2, 1])
    """
    return (gate > threshold).sum(dim=1)


def classes_per_filter(gate: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Number of classes that each filter serves with more than ``threshold`` of full strength.

    Args:
        gate: Class-filter matrix [classes, filters], entries in [0, 1].
        threshold: See ``filters_per_class``.

    Returns:
        Counts, int64 [filters].

    Example:
        >>> classes_per_filter(torch.tensor([[1.0, 0.9], [0.0, 1.0]]))
        tensor([1, 2])
    """
    return (gate > threshold).sum(dim=0)


def binarity(gate: Tensor) -> Tensor:
    """How close the entries are to 0 or 1: 1 if all of them are, 0 if all are 0.5.

    1 - 2 × mean of min(g, 1 - g). Ours; the paper's ideal gate is one-hot for each filter, and its training relaxes it
    to [0, 1] (Liang et al., ECCV 2020, https://arxiv.org/abs/2007.08194). A gate of all ones is binary too, so read it
    together with ``gate_density``.

    Args:
        gate: Class-filter matrix [classes, filters], entries in [0, 1].

    Returns:
        Scalar in [0, 1], no unit.

    Example:
        >>> binarity(torch.tensor([[1.0, 0.25], [0.0, 1.0]]))
        tensor(0.8750)
    """
    return 1 - 2 * torch.minimum(gate, 1 - gate).mean()


@in_one_line
class GateCounts(NamedTuple):
    """Entries and filters counted by ``gate_counts``, all int64 scalars.

    Attributes:
        owned: Entries above 0.95: the filter is open for the class at (nearly) full strength.
        shared: Entries above 0.5; owned ones too.
        between: Entries above 0.05 and up to 0.95, neither open nor closed.
        exclusive: Filters that serve exactly one class with more than 0.5.
    """

    owned: Tensor
    shared: Tensor
    between: Tensor
    exclusive: Tensor


def gate_counts(gate: Tensor) -> GateCounts:
    """Count what is owned, shared and undecided, with the thresholds of the authors' notebooks (0.95 and 0.5).

    Liang et al., ECCV 2020 (https://arxiv.org/abs/2007.08194); the thresholds are in their code only.

    For one owner each: ``owned`` = ``shared`` = ``exclusive`` = number of filters and ``between`` = 0.

    Args:
        gate: Class-filter matrix [classes, filters], entries in [0, 1].

    Returns:
        The counts.

    Example:
        >>> gate_counts(torch.tensor([[1.0, 0.7], [0.1, 1.0]]))
        GateCounts(owned=tensor(2), shared=tensor(3), between=tensor(2), exclusive=tensor(1))
    """
    return GateCounts(
        owned=(gate > 0.95).sum(),
        shared=(gate > 0.5).sum(),
        between=((gate > 0.05) & (gate <= 0.95)).sum(),
        exclusive=(classes_per_filter(gate) == 1).sum(),
    )


def owner_agreement(gate: Tensor, mutual_information: Tensor) -> Tensor:
    """Share of the owned filters whose owner by the gate is also the class they reveal most about.

    With two classes a filter reveals as much of one as of the other, so this says nothing there; ``verdict`` does.

    Args:
        gate: Class-filter matrix [classes, filters].
        mutual_information: [classes, filters], nats.

    Returns:
        Scalar in [0, 1], no unit.

    Raises:
        ValueError: If the matrices have different shapes.

    Example:
        >>> owner_agreement(torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.3, 0.2], [0.0, 0.1]]))
        tensor(0.5000)
    """
    if gate.shape != mutual_information.shape:
        raise ValueError(
            f"expected two matrices of the same shape, but found {list(gate.shape)} and "
            f"{list(mutual_information.shape)}."
        )
    owned = owned_filters(gate)
    agrees = owned.gather(0, mutual_information.argmax(dim=0)[None])[0]
    return agrees[owned.any(dim=0)].to(torch.get_default_dtype()).mean()


def chance_agreement(gate: Tensor, mutual_information: Tensor) -> float:
    """What ``owner_agreement`` would be if the filters were dealt out anew, as many for each class as it owns.

    Sum over classes of the share of filters that the class owns × the share that reveal most about it.

    Args:
        gate: Class-filter matrix [classes, filters]; a filter that several classes own equally counts for the first.
        mutual_information: [classes, filters], nats.

    Returns:
        A share in [0, 1], no unit.

    Example:
        >>> chance_agreement(torch.eye(2), torch.tensor([[0.3, 0.2], [0.1, 0.1]]))
        0.5
    """
    owner = owners(gate)
    labels = (owner[owner >= 0], mutual_information.argmax(dim=0))
    shares = [torch.bincount(each, minlength=len(gate)) / max(1, len(each)) for each in labels]
    return float(shares[0] @ shares[1])
