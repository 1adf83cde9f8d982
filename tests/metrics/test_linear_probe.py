"""relearning: fresh probes see all filters but the class's own, and are judged on held-out pictures."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from timm_csg import metrics


def responses(samples, classes=4, each=3, seed=0, shared=0.0):
    """Every class has filters of its own; ``shared`` is how much the next class's filters respond to it, too."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % classes
    owners = torch.arange(classes * each) % classes
    own = (targets[:, None] == owners).float() + shared * (targets[:, None] == (owners + 1) % classes)
    return (torch.randn(samples, classes * each, generator=generator) + 6 * own).relu(), targets, owners


def test_equals_probes_fitted_one_after_the_other():
    features, targets, owners = responses(80, shared=0.3)
    held_out, wanted, _ = responses(60, seed=1, shared=0.3)
    found = metrics.relearning(features, targets, owners, (held_out, wanted))
    mean, deviation = features.double().numpy().mean(0), features.double().numpy().std(0)
    for removed in (None, 0, 1, 2, 3):
        kept = [index for index in range(12) if int(owners[index]) != removed]
        standardised = [((rows.double().numpy() - mean) / deviation)[:, kept] for rows in (features, held_out)]
        named = LogisticRegression(max_iter=1000).fit(standardised[0], targets).predict(standardised[1])
        for index in range(4) if removed is None else [removed]:
            expected = np.mean(named[wanted.numpy() == index] == index)
            assert float((found.before if removed is None else found.after)[index]) == pytest.approx(expected)


def test_a_class_comes_back_only_if_other_filters_tell_it():
    features, targets, owners = responses(400, classes=2)
    found = metrics.relearning(features, targets, owners, (features, targets))
    assert found.after.tolist() == pytest.approx([1, 1], abs=0.03)  # the other class's filters tell it by silence
    features[:, owners == 1] = torch.rand(400, 3, generator=torch.Generator().manual_seed(2))  # tell nothing
    gone = metrics.relearning(features, targets, owners, (features, targets))
    assert float(gone.before.mean()) > 0.95
    assert float(gone.after[0]) < 0.65
    assert float(gone.after[1]) > 0.95


def test_only_the_classes_named_are_fitted_and_one_without_filters_stays():
    features, targets, owners = responses(80)
    fits = []
    own = owners == torch.arange(4)[:, None]
    own[2] = False
    found = metrics.relearning(features, targets, own, (features, targets), classes=[1, 2], progress=fits.append)
    assert fits == [1, 1]
    assert found.after.isnan().tolist() == [True, False, False, True]
    assert found.after[2] == found.before[2]


def test_a_class_without_filters_left_or_without_pictures_is_answered():
    features, targets, _ = responses(80)
    found = metrics.relearning(
        features, targets, torch.zeros(12).long(), (features[targets != 3], targets[targets != 3]), 5
    )
    assert float(found.after[0]) == 1  # nothing is left to see: the first of equally frequent classes is named
    assert found.before.isnan().tolist() == [False, False, False, True, True]


def test_what_does_not_fit_is_refused():
    features, targets, owners = responses(80)
    with pytest.raises(ValueError, match="12 filters, but the held-out features have 11"):
        metrics.relearning(features, targets, owners, (features[:, 1:], targets))
    with pytest.raises(ValueError, match="owners are of 11 filters, but features has 12"):
        metrics.relearning(features, targets, owners[1:], (features, targets))
    with pytest.raises(ValueError, match="at least two classes"):
        metrics.relearning(features, targets * 0, owners, (features, targets))
    with pytest.raises(ValueError, match="one row per sample"):
        metrics.relearning(features, targets, owners, (features, targets[1:]))
