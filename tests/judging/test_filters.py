"""Filters beside their floors: the single metrics with true and with shuffled labels."""

import pytest
import torch

from timm_csg import judging, metrics


@pytest.fixture
def known():
    """Twelve filters, each for one of three classes, noise on them."""
    targets = torch.arange(90) % 3
    own = torch.nn.functional.one_hot(targets, 3).float().repeat(1, 4)
    return own + 0.3 * torch.rand(90, 12, generator=torch.Generator().manual_seed(0)), targets


def test_scores_are_the_metrics_and_floors_those_of_shuffled_labels(known):
    features, targets = known
    embeddings = torch.nn.functional.one_hot(targets, 3).float() + 0.1
    found = judging.judge_filters(features, targets, embeddings=embeddings, most_fits=4, seed=5)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    for name in ("purity", "class_independence", "class_selectivity"):
        options = {"count": 20} if name == "purity" else {}
        for value, labels in ((found[name].score, targets), (found[name].chance, targets[order])):
            assert value == pytest.approx(float(getattr(metrics, name)(features, labels, **options).mean()), abs=1e-6)
    assert found["mono_score"].score == pytest.approx(float(metrics.mono_score(features, embeddings).mean()), abs=1e-6)
    shuffled = metrics.mono_score(features, embeddings[order]).mean()
    assert found["mono_score"].chance == pytest.approx(float(shuffled), abs=1e-6)
    assert found["purity"].score > 0.95 > 0.7 > found["purity"].chance
    assert found["class_independence"].score < found["class_independence"].chance
    assert len(found["contrastiveness"].values) == 4
    assert found["contrastiveness"].score == found["contrastiveness"].chance


def test_only_used_filters_are_judged(known):
    features, targets = known
    used = torch.arange(12) < 3
    found = judging.judge_filters(features, targets, used=used)
    assert len(found["purity"].values) == 3
    assert "mono_score" not in found
    with pytest.raises(ValueError, match="no filter is used"):
        judging.judge_filters(features, targets, used=used & False)


def test_signed_responses_have_no_selectivity_index(known):
    assert "class_selectivity" not in judging.judge_filters(known[0] - 1, known[1])


def test_diversity_is_that_of_the_own_filters_and_of_anothers():
    maps = torch.rand(20, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    own, targets = torch.tensor([[0, 1], [2, 3], [5, 4]]), torch.arange(20) % 3
    found = judging.judge_diversity(maps, own, targets)
    chosen = torch.stack([maps[row, own[target]] for row, target in enumerate(targets.tolist())])
    torch.testing.assert_close(found.values, metrics.spatial_diversity(chosen).float())
    assert found.chance != found.score
    with pytest.raises(ValueError, match=r"own \[classes, k\]"):
        judging.judge_diversity(maps, own[:2], targets)
