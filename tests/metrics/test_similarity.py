"""Similarity of filters: which weights, and the means within and across classes."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

import timm_csg
from timm_csg import measuring, metrics


def test_weight_similarity_is_that_of_scikit_learn():
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.abs(cosine_similarity(weight.flatten(1).numpy()))
    assert np.allclose(metrics.weight_similarity(weight).numpy(), expected)


def test_activation_similarity_is_the_absolute_correlation_of_numpy():
    features = torch.rand(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    features[:, 1] = 2 - features[:, 0]
    expected = np.abs(np.corrcoef(features.numpy(), rowvar=False))
    assert np.allclose(metrics.activation_similarity(features).numpy(), expected)


def test_constant_filters_and_zero_weights_are_similar_to_nothing():
    features = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    features[:, 1] = 0.1
    similarity = metrics.activation_similarity(features)
    assert similarity[1].tolist() == [0, 0, 0]
    assert not similarity.isnan().any()
    assert metrics.weight_similarity(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[0, 0], [0, 1]]


def test_random_weights_have_the_similarity_stated():
    weight = torch.randn(200, 576, generator=torch.Generator().manual_seed(0))
    mean = metrics.summarize_similarity(metrics.weight_similarity(weight), torch.zeros(200, dtype=torch.long)).overall
    assert mean == pytest.approx(math.sqrt(2 / (math.pi * 576)), rel=0.02)


def test_summary_equals_a_loop_over_pairs():
    similarity = torch.rand(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    similarity = (similarity + similarity.T) / 2
    owners = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])
    pairs = [(first, second) for first in range(9) for second in range(first)]
    same = [float(similarity[pair]) for pair in pairs if owners[pair[0]] == owners[pair[1]]]
    other = [float(similarity[pair]) for pair in pairs if owners[pair[0]] != owners[pair[1]]]
    summary = metrics.summarize_similarity(similarity, owners)
    assert summary.within == pytest.approx(np.mean(same))
    assert summary.across == pytest.approx(np.mean(other))
    assert summary.overall == pytest.approx(np.mean(same + other))
    assert math.isnan(metrics.summarize_similarity(similarity, torch.arange(9)).within)
    with pytest.raises(ValueError, match="of 4 filters"):
        metrics.summarize_similarity(similarity, torch.arange(4))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "layer4.0.conv2"),
        ("test_convnext", "stages.3.blocks.1.mlp.fc2"),
        ("test_mambaout", "stages.3.blocks.0.fc2"),
        ("test_vit", "blocks.5.mlp.fc2"),
    ],
)
def test_stage_weight_is_that_of_the_last_layer_which_makes_the_filters(make_model, name, layer):
    model = timm_csg.differentiate(make_model(name), mechanism="csg").train()
    found = measuring.stage_weight(model, torch.rand(1, 3, 64, 64))
    assert found.name == layer
    assert torch.equal(found.weight, dict(model.named_modules())[layer].weight.flatten(1))
    assert len(found.weight) == model.mechanism.num_filters
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_stage_without_a_layer_of_its_own_is_refused(make_model):
    model = make_model()
    model.num_features = 95
    with pytest.raises(ValueError, match="makes 95 filters"):
        measuring.stage_weight(model)
