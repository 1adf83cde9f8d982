"""Why an image is given a class: by hand for the tiny net, and consistent with the other explanations."""

import pytest
import torch

import timm_csg
from timm_csg.explain import class_filters, explain_prediction, filter_maps


def test_tiny_net_is_explained_as_by_hand(tiny_net, picture):
    # Pooled u = 1, v = 1.5; logits 2 - 1.5 + 0.25 and -1 + 4.5 - 9.
    (why,) = explain_prediction(tiny_net(), picture, top=2)
    assert (why.target, why.predicted, why.gated) == (0, 0, None)
    assert why.standard.logit == 0.75
    assert why.probability == pytest.approx(1 / (1 + 2.718281828 ** (-5.5 - 0.75)))
    rows = [(f.filter, f.gate, f.owner, f.activation, f.contribution, f.share) for f in why.filters]
    assert rows == [(0, None, None, 1.0, 2.0, 1.0), (1, None, None, 1.5, -1.5, -0.75)]
    assert why.filters[1].map.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert why.standard.owned_share is None
    assert why.standard.exact


def test_gate_of_the_tiny_net_chooses_owned_filters_and_scales_the_gated_path(tiny_net, picture):
    model = timm_csg.differentiate(tiny_net(), mechanism="csg")
    with torch.no_grad():
        model.mechanism.gate.copy_(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    (why,) = explain_prediction(model, picture, top=2)
    assert [(f.filter, f.gate, f.owner) for f in why.filters] == [(0, 1.0, 0)]
    assert why.standard.owned_share == 1.0
    assert (why.gated.logit, why.gated.filters[0].contribution) == (2 - 0.75 + 0.25, 2.0)
    (other,) = explain_prediction(model, picture, 1, top=2)
    assert (other.target, other.predicted) == (1, 0)
    assert [(f.filter, f.contribution) for f in other.gated.filters] == [(1, 4.5)]
    assert other.gated.logit == 4.5 - 9.0


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_every_layout_is_explained_on_both_paths(any_model, images, gated, mechanism):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism))
    for image, why in enumerate(explain_prediction(model, images, top=3)):
        for evidence in (why.standard, why.gated):
            assert len(evidence.filters) <= 3
            assert 0 <= evidence.owned_share <= 1 + 1e-6
            every = class_filters(model, images, why.target, top=model.mechanism.num_filters, path=evidence.path)
            for found in evidence.filters:
                assert found.owner == why.target
                place = every.filters[image].tolist().index(found.filter)
                assert found.contribution == pytest.approx(float(every.contribution[image, place]), rel=1e-3, abs=1e-6)
                assert found.share == pytest.approx(float(every.share[image, place]), rel=1e-3, abs=1e-6)
                if getattr(model, "global_pool", "avg") == "token":
                    assert found.map is None
                else:
                    torch.testing.assert_close(found.map, filter_maps(model, images, found.filter)[image, 0])


def test_logits_are_the_models(tiny_model, images, gated):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="assigned"))
    with torch.no_grad():
        out = model(images, paths=("standard", "gated"))
    for image, why in enumerate(explain_prediction(model, images)):
        assert why.predicted == int(out.standard[image].argmax())
        assert why.standard.logit == pytest.approx(float(out.standard[image, why.target]), rel=1e-5)
        assert why.gated.logit == pytest.approx(float(out.gated[image, why.target]), rel=1e-5)
        assert why.gated.predicted == int(out.gated[image].argmax())


def test_class_without_own_filters_is_explained_by_all(tiny_net, picture):
    model = timm_csg.differentiate(tiny_net(), mechanism="csg")
    with torch.no_grad():
        model.mechanism.gate.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    (why,) = explain_prediction(model, picture, 0, top=2)
    assert [f.filter for f in why.filters] == [0, 1]
    assert why.standard.owned_share == 0.0


def test_class_token_models_are_explained_without_maps(make_model, images):
    (why, *_) = explain_prediction(make_model("test_vit", global_pool="token"), images)
    assert [f.map for f in why.filters] == [None] * 5


def test_a_filter_that_serves_no_class_is_not_the_first_ones(tiny_net, picture):
    model = timm_csg.differentiate(tiny_net(), mechanism="csg")
    with torch.no_grad():
        model.mechanism.gate.copy_(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    (why,) = explain_prediction(model, picture, 0, top=2)  # class 0 owns nothing, so all filters are shown
    assert [(f.filter, f.owner) for f in why.filters] == [(0, None), (1, 1)]
    assert why.standard.owned_share == 0.0
