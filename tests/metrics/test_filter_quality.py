"""The measures of related methods against loops, and at their edges."""

import sys

import pytest
import torch
from reference import filter_quality as reference

from timm_csg import metrics


@pytest.fixture
def features():
    features = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 2.0
    return features


@pytest.fixture
def labels():
    return torch.arange(60) % 4


def test_class_independence_equals_a_loop(features, labels, monkeypatch):
    expected = reference.class_independence(features, labels)
    monkeypatch.setattr(sys.modules["timm_csg.metrics.class_specificity"], "_VALUES_PER_CHUNK", 120)
    torch.testing.assert_close(metrics.class_independence(features, labels, 9), expected)
    assert expected[3] == 1


def test_class_independence_of_a_filter_of_one_class_is_zero():
    own = torch.nn.functional.one_hot(torch.arange(12) % 3).float()
    assert metrics.class_independence(own, torch.arange(12) % 3).tolist() == [0, 0, 0]


def test_spatial_diversity_equals_a_loop():
    maps = torch.randn(4, 5, 3, 6, generator=torch.Generator().manual_seed(0))
    maps[1, 2] = 0
    torch.testing.assert_close(metrics.spatial_diversity(maps), reference.spatial_diversity(maps))


def test_spatial_diversity_runs_from_one_place_to_different_ones():
    places = torch.eye(25).view(25, 5, 5)
    assert float(metrics.spatial_diversity(100 * places[[3] * 5][None])) == pytest.approx(0.2)
    assert float(metrics.spatial_diversity(100 * places[:5][None])) == pytest.approx(1, abs=1e-6)
    assert float(metrics.spatial_diversity(torch.ones(1, 5, 4, 4))) == pytest.approx(0.2)


def test_mono_score_equals_all_pairs(features, monkeypatch):
    embeddings = torch.randn(60, 8, generator=torch.Generator().manual_seed(1)) + 1
    features[:, 5] = (torch.arange(60) == 8).float()  # responds to one picture
    monkeypatch.setattr(sys.modules["timm_csg.metrics.class_specificity"], "_VALUES_PER_CHUNK", 120)
    found = metrics.mono_score(features.half(), 3 * embeddings)
    torch.testing.assert_close(found, reference.mono_score(features.half(), embeddings))
    assert (float(found[3]), float(found[5])) == (0, 0)


def test_contrastiveness_is_one_minus_the_overlap_of_the_components():
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(4000, generator=generator) < 0.3
    apart = torch.tensor([1.0, 3.0, 10.0])
    features = torch.randn(4000, 3, generator=generator) + on[:, None] * apart
    found = metrics.contrastiveness(features)
    assert float(found[1]) == pytest.approx(1 - reference.overlap(0, 1, 3, 1), abs=0.05)
    assert float(found[2]) == pytest.approx(1, abs=1e-4)
    assert float(found[0]) < float(found[1])


def test_contrastiveness_does_not_depend_on_scale_and_constant_filters_have_none(features):
    found = metrics.contrastiveness(features)
    torch.testing.assert_close(metrics.contrastiveness(1e-6 * features.double() + 5), found, atol=1e-6, rtol=0)
    assert float(found[3]) == 0


def test_what_does_not_fit_is_refused(features, labels):
    with pytest.raises(ValueError, match="60 and 59"):
        metrics.mono_score(features, torch.ones(59, 2))
    with pytest.raises(ValueError, match="one row per sample"):
        metrics.class_independence(features, labels[1:])
    with pytest.raises(ValueError, match="chosen filters, height, width"):
        metrics.spatial_diversity(features)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.contrastiveness(features[:1])
