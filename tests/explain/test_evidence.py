"""The evidence map of assigned filters adds up to the gated logit, and is refused where there are no averages."""

import pytest
import torch

import timm_csg
from timm_csg import explain


@pytest.fixture(params=["test_resnet", "test_convnext", "test_mambaout", "test_vit"])
def assigned(request, make_model, gated):
    options = {"global_pool": "avg"} if request.param == "test_vit" else {}
    return gated(timm_csg.differentiate(make_model(request.param, **options), mechanism="assigned"))


def test_its_sum_and_the_bias_are_the_gated_logit(assigned, images, targets):
    with torch.no_grad():
        gated = assigned(images, paths=("gated",)).gated.gather(1, targets[:, None])[:, 0]
    found = explain.evidence_map(assigned, images, targets, upsample=False)
    torch.testing.assert_close(found.sum(dim=(1, 2)) + assigned.mechanism.bias[targets], gated, rtol=1e-4, atol=1e-4)
    assert explain.evidence_map(assigned, images, targets).shape == (3, 64, 64)


def test_each_place_is_the_standardised_response_of_own_filters(make_model, images, targets, gated):
    model = gated(timm_csg.differentiate(make_model(), mechanism="assigned"))
    mechanism, maps = model.mechanism, explain.filter_maps(model, images, upsample=False)
    found = explain.evidence_map(model, images, targets, upsample=False)
    for picture, target in enumerate(targets.tolist()):
        own = mechanism.owned[target].nonzero()[:, 0].tolist()
        expected = torch.zeros(maps.shape[2:])
        for kernel in own:
            deviation = (float(mechanism.variance[kernel]) + 1e-6) ** 0.5
            standardised = (maps[picture, kernel] - mechanism.mean[kernel]) / deviation
            expected += mechanism.scale[kernel].detach() * standardised / len(own) / maps[0, 0].numel()
        torch.testing.assert_close(found[picture], expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_assigned_filters_is_refused(make_model, images):
    for model in (make_model(), timm_csg.differentiate(make_model(), mechanism="csg")):
        with pytest.raises(ValueError, match="has no assigned filters"):
            explain.evidence_map(model, images)
        with pytest.raises(ValueError, match="has no assigned filters"):
            explain.guided_evidence_map(model, images)


def test_the_guided_evidence_map_is_the_product_of_its_parts(make_model, images, targets, gated):
    model = gated(timm_csg.differentiate(make_model(), mechanism="assigned"))
    model.mechanism.mean.copy_(explain.filter_maps(model, images, upsample=False).mean(dim=(0, 2, 3)))
    coarse = explain.evidence_map(model, images, targets).clamp(min=0)
    assert 0 < (coarse > 0).float().mean() < 1
    expected = explain.guided_backprop(model, images, targets) * coarse[:, None]
    torch.testing.assert_close(explain.guided_evidence_map(model, images, targets), expected, rtol=1e-4, atol=1e-8)
