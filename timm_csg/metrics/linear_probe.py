"""What is left of a class in the filters of the others: a fresh linear probe after its own filters were removed.

Removing a class's filters hides the class from the model's classifier; it does not delete what the other filters know.
Work on unlearning asks this as "knowledge retention": whether a new linear layer on the changed network's features
finds the class again (Lee et al., ESC, CVPR 2025, https://arxiv.org/abs/2504.02199).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_csg.metrics._checks import check_features, check_rows, class_counts
from timm_csg.metrics.ablation import own_filters
from timm_csg.metrics.display import in_one_line


@in_one_line
class Relearning(NamedTuple):
    """Accuracy of fresh linear probes on each class's held-out pictures [classes]; NaN where there are none.

    Attributes:
        before: Of a probe on all filters.
        after: Of a probe that had all filters but the class's own; the same as ``before`` for a class without any.
    """

    before: Tensor
    after: Tensor


def relearning(
    features: Tensor,
    targets: Tensor,
    filter_owners: Tensor,
    held_out: tuple[Tensor, Tensor],
    num_classes: int | None = None,
    *,
    classes: Iterable[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Relearning:
    """Accuracy of each class when a new linear classifier is fitted without the class's filters.

    For every class c: multinomial logistic regression (scikit-learn, L2 with C = 1) on the standardised responses of
    all filters that c does not own, fitted on ``features``; the share of c's held-out pictures that it names c. Near
    ``before``: **removal only hides the class**, the rest of the network still tells it. Near 0: it is really gone.
    A high value says nothing against the owners; it says what removing them is not.

    One fit per class that owns filters: seconds for 1,000 pictures, 1,000 filters and 20 classes, and growing with the
    square of the number of classes; name some ``classes`` where there are many.

    Args:
        features: Pooled responses [samples, filters] on which the probes are fitted, usually of training pictures.
        targets: Their class indices [samples], of at least two classes.
        filter_owners: Class of each filter, int [filters]; or which filters are each class's, bool [classes, filters].
        held_out: Responses [other samples, filters] and class indices of the pictures that are counted.
        num_classes: Number of classes; the largest target + 1 if left out.
        classes: Those to relearn, the others have NaN in ``after``; None: all.
        progress: Called with 1 after each fit.

    Returns:
        The accuracies, float64 on the CPU.

    Raises:
        TypeError, ValueError: If the arguments are not as stated or do not fit each other.

    Example:
        >>> targets = torch.arange(40) % 2
        >>> features = torch.nn.functional.one_hot(targets).float().repeat(1, 2)
        >>> relearning(features, targets, torch.tensor([0, 1, 1, 1]), (features, targets))
        Relearning(before=tensor([1., 1.], dtype=torch.float64), after=tensor([1., 1.], dtype=torch.float64))
    """
    counts = _check(features, targets, held_out, num_classes)
    own = own_filters(filter_owners, len(counts)).cpu().numpy()
    if own.shape[1] != features.shape[1]:
        raise ValueError(f"the owners are of {own.shape[1]} filters, but features has {features.shape[1]}.")
    seen, unseen = (values.detach().double().cpu().numpy() for values in (features, held_out[0]))
    labels, wanted = targets.cpu().numpy(), held_out[1].cpu().numpy()

    def accuracies(kept: np.ndarray) -> Tensor:
        hits = torch.from_numpy(_probe(seen[:, kept], labels, unseen[:, kept]) == wanted).double()
        if progress is not None:
            progress(1)
        where = torch.from_numpy(wanted).long()
        return torch.bincount(where, weights=hits, minlength=len(counts)) / torch.bincount(where, minlength=len(counts))

    before = accuracies(np.ones(own.shape[1], dtype=bool))
    after = torch.full_like(before, torch.nan)
    for index in range(len(counts)) if classes is None else classes:
        after[index] = accuracies(~own[index])[index] if own[index].any() else before[index]
    return Relearning(before, after)


def _check(features: Tensor, targets: Tensor, held_out: tuple[Tensor, Tensor], num_classes: int | None) -> Tensor:
    for responses, labels in ((features, targets), held_out):
        check_features(responses)
        class_counts(labels, num_classes)
        check_rows(responses, labels)
    if features.shape[1] != held_out[0].shape[1]:
        raise ValueError(
            f"features has {features.shape[1]} filters, but the held-out features have {held_out[0].shape[1]}; "
            "collect both from the same model."
        )
    counts = class_counts(torch.cat([targets.cpu().long(), held_out[1].cpu().long()]), num_classes)
    if len(targets.unique()) < 2:
        raise ValueError("a probe needs pictures of at least two classes, but targets holds one; pass more pictures.")
    return counts


def _probe(features: np.ndarray, targets: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Classes that a fresh linear classifier names for other rows; the most frequent class where no filter is left."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if features.shape[1] == 0:
        return np.full(len(others), np.bincount(targets).argmax())
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, targets)
    predictions: np.ndarray = probe.predict(others)
    return predictions
