"""How much a perfect filter could know of its class in a network that makes mistakes: an upper mark for its MIS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_csg import metrics


def ideal_owners(logits: Tensor, targets: Tensor, classes: int) -> dict[str, float]:
    """The MIS that a network would have if every filter answered what the whole network does.

    Args:
        logits: Of the network [pictures, classes].
        targets: Class indices [pictures].
        classes: Their number.

    Returns:
        ``MIS_of_answer``: each filter says whether the network names its class, 0 or 1; ``MIS_of_probability``: it has
        the network's probability of that class. Means over the classes, as if each owned equally many filters.

    Example:
        >>> right = ideal_owners(100 * torch.eye(3)[[0, 1, 2] * 40], torch.tensor([0, 1, 2] * 40), 3)
        >>> {name: round(value, 2) for name, value in right.items()}
        {'MIS_of_answer': 0.64, 'MIS_of_probability': 0.64}
    """
    logits = logits.double()
    filters = {"answer": F.one_hot(logits.argmax(dim=1), classes).double(), "probability": logits.softmax(dim=1)}
    known = {name: metrics.mutual_information(responses, targets, classes) for name, responses in filters.items()}
    return {f"MIS_of_{name}": float(torch.diagonal(mutual).mean()) for name, mutual in known.items()}
