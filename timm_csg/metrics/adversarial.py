"""Telling attacked images from clean ones by the responses of the filters, with a trained detector and without.

Liang et al., ECCV 2020 (https://arxiv.org/abs/2007.08194) report that class-specific filters help here. Their attacks,
classifiers and error rates could not be checked, so this protocol is ours: the same images clean and attacked, half of
the images to learn from, error rate on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def detection_errors(
    clean: Tensor, attacked: Tensor, *, classifiers: Mapping[str, Any] | None = None, seed: int = 0
) -> dict[str, float]:
    """Error rate of scikit-learn classifiers that learn to tell attacked images from clean ones.

    Each image comes twice, clean and attacked. A random half of the *images* is learnt from and the other half judged,
    so that no classifier has seen the twin of what it judges. As many clean as attacked: guessing gives 0.5.

    Args:
        clean: Pooled responses (or anything else) of the clean images [images, values].
        attacked: Those of the same images, attacked, in the same order [images, values]. Choose the images first, for
            example those that the attack turned from right to wrong; a harmless attack is hard to see and no danger.
        classifiers: Name to a scikit-learn classifier, which is fitted; None: ``default_classifiers(seed)``.
        seed: Of the split and the default classifiers.

    Returns:
        Name to error rate, in [0, 1].

    Raises:
        ValueError: If the two do not hold the same images.

    Example:
        >>> clean = torch.arange(40.0)[:, None]
        >>> errors = detection_errors(clean, clean + 100)
        >>> sorted(errors), max(errors.values())
        (['gradient boosting', 'k nearest neighbours', 'logistic regression', 'random forest'], 0.0)
    """
    import numpy as np

    if clean.shape != attacked.shape or clean.ndim != 2 or len(clean) < 4:
        raise ValueError(
            "clean and attacked must be [images, values] for the same images, at least 4, but are "
            f"{list(clean.shape)} and {list(attacked.shape)}."
        )
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed), device="cpu")
    half = len(clean) // 2
    parts = []
    for images in (order[:half], order[half:]):
        rows = torch.cat([clean[images], attacked[images]]).detach().cpu().double().numpy()
        parts.append((rows, np.repeat([0, 1], len(images))))
    (train_rows, train_labels), (test_rows, test_labels) = parts
    errors = {}
    for name, classifier in (default_classifiers(seed) if classifiers is None else classifiers).items():
        classifier.fit(train_rows, train_labels)
        errors[name] = float((classifier.predict(test_rows) != test_labels).mean())
    return errors


def default_classifiers(seed: int = 0) -> dict[str, Any]:
    """New scikit-learn classifiers, default options: random forest, logistic regression, 5 neighbours, boosting.

    Values are standardised for the two that need it; boosting is the histogram kind, the others are far slower.

    Args:
        seed: Of those that draw at random.

    Returns:
        Name to classifier.

    Example:
        >>> len(default_classifiers())
        4
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "random forest": RandomForestClassifier(random_state=seed),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "k nearest neighbours": make_pipeline(StandardScaler(), KNeighborsClassifier()),
        "gradient boosting": HistGradientBoostingClassifier(random_state=seed),
    }


def path_disagreement(standard_logits: Tensor, gated_logits: Tensor) -> Tensor:
    """How far apart the predictions of the two paths are: a score for attacked images that needs no training. Ours.

    Total variation, half of Σ |p - q| over classes, of softmax(standard) and softmax(gated). An attack on the standard
    path moves its logits; where the gated path, through the filters of the predicted class (label gating:
    ``collect(..., gated_by="prediction")``) or of each class (assigned filters), does not follow, the two disagree.

    Args:
        standard_logits: [samples, classes].
        gated_logits: [samples, classes].

    Returns:
        Scores [samples] in [0, 1]; 0 if both paths say the same.

    Raises:
        ValueError: If the logits have different shapes.

    Example:
        >>> path_disagreement(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([[100.0, 0.0], [0.0, 0.0]]))
        tensor([0.5000, 0.0000])
    """
    if standard_logits.shape != gated_logits.shape:
        raise ValueError(
            f"expected logits for the same images and classes, but found {list(standard_logits.shape)} and "
            f"{list(gated_logits.shape)}."
        )
    return (standard_logits.softmax(dim=1) - gated_logits.softmax(dim=1)).abs().sum(dim=1) / 2


class Detection(NamedTuple):
    """How well a score tells attacked images from clean ones.

    Attributes:
        auc: Area under the ROC curve: the chance that an attacked image has a higher score than a clean one. 0.5 is
            guessing; below 0.5 the score points the wrong way.
        threshold: Scores above it raise an alarm.
        false_alarms: Share of clean images with an alarm.
        misses: Share of attacked images without one.
        error: Mean of the two; 0.5 is guessing.
    """

    auc: float
    threshold: float
    false_alarms: float
    misses: float
    error: float


def threshold_detection(clean: Tensor, attacked: Tensor, *, false_alarm_rate: float = 0.05, seed: int = 0) -> Detection:
    """Judge a score: ROC AUC, and the error at a threshold that was chosen without seeing an attack.

    The threshold is the (1 - ``false_alarm_rate``) quantile of the scores of a random half of the clean images; the
    rates are measured on the other half, clean and attacked.

    Args:
        clean: Scores of the clean images [images], higher for more suspicious, for example ``path_disagreement``.
        attacked: Scores of the same images, attacked, in the same order [images].
        false_alarm_rate: Share of clean images that may raise an alarm.
        seed: Of the split.

    Returns:
        The rates.

    Raises:
        ValueError: If there are too few scores, or the rate is not between 0 and 1.

    Example:
        >>> threshold_detection(torch.arange(40.0), torch.arange(40.0) + 100).auc
        1.0
    """
    if clean.shape != attacked.shape or clean.ndim != 1 or len(clean) < 4:
        raise ValueError(
            f"clean and attacked must be scores [images] for the same images, at least 4, but are {list(clean.shape)} "
            f"and {list(attacked.shape)}."
        )
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must be between 0 and 1, but is {false_alarm_rate}.")
    clean, attacked = clean.detach().double().cpu(), attacked.detach().double().cpu()
    ordered = clean.sort().values
    below, not_above = (torch.searchsorted(ordered, attacked, right=right).double() for right in (False, True))
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed), device="cpu")
    chosen, judged = order[: len(clean) // 2], order[len(clean) // 2 :]
    threshold = clean[chosen].quantile(1 - false_alarm_rate, interpolation="higher")
    false_alarms = float((clean[judged] > threshold).double().mean())
    misses = float((attacked[judged] <= threshold).double().mean())
    return Detection(
        auc=float(((below + not_above) / 2 / len(clean)).mean()),
        threshold=float(threshold),
        false_alarms=false_alarms,
        misses=misses,
        error=(false_alarms + misses) / 2,
    )
