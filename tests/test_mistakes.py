"""Mistakes of users: one sentence that says what to do, before anything is computed or written."""

import pytest
import torch

import timm_csg
from timm_csg import explain, judging, measuring, metrics


@pytest.fixture
def model(make_model):
    return timm_csg.differentiate(make_model(num_classes=3)).eval()


@pytest.fixture
def given():
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


@pytest.mark.parametrize("mechanism", ["assigned", "csg", "icnn", "picnn", ["icnn", "csg"]], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_another_number_of_targets_is_not_spread_over_all_images(make_model, given, mechanism, count):
    model = timm_csg.differentiate(make_model(num_classes=3), mechanism=mechanism).train()
    images, targets = given
    for wrong in (targets[:count], torch.full((count, 3), 1 / 3)):
        with pytest.raises(ValueError, match=f"there are 6 images but {count} targets"):
            model(images, wrong, paths=("standard", "gated"))
    with pytest.raises(ValueError, match="there are 6 images but no targets"):
        model(images, targets[0])


def test_a_filter_of_no_class_has_no_owner_in_a_contrast(make_model, given):
    model = timm_csg.differentiate(make_model(num_classes=3), filters_per_class=2).eval()
    matrix = model.mechanism.class_filter_matrix()
    found = explain.contrast(model, given[0], 1, 2).owner
    assert torch.equal(found, metrics.owners(matrix))
    assert (found < 0).sum() == 90


@pytest.mark.parametrize(
    ("judge", "error", "text"),
    [
        (lambda m, x, y: judging.judge("grad_cam", m, x, y), TypeError, "explain must be a function .* is 'grad_cam'"),
        (lambda m, x, y: judging.judge(explain.cam, m, x, y, judges="deletion"), TypeError, r"list of names, \['del"),
        (lambda m, x, y: judging.judge_filters(m, y), TypeError, "features must be a floating-point tensor .*ResNet"),
        (lambda m, x, y: measuring.measure(m, [(x, y)], "accuracy"), TypeError, r"list of names, \['accuracy'\]"),
        (
            lambda m, x, y: measuring.measure(m, [(x, y)], ["accuracy"], encoder="resnet81"),
            ValueError,
            "timm has no model 'resnet81' for the encoder. Did you mean 'resnet18'",
        ),
        (
            lambda m, x, y: timm_csg.param_groups(m, lr="0.1"),
            ValueError,
            "lr must be a number, 0 or more, but is '0.1'",
        ),
        (lambda m, x, y: timm_csg.param_groups(m, lr=float("inf")), ValueError, "lr must be a number"),
    ],
    ids=["explain", "judges", "features", "groups", "encoder", "rate as text", "infinite rate"],
)
def test_wrong_arguments_are_named(model, given, judge, error, text):
    with pytest.raises(error, match=text):
        judge(model, *given)


def test_place_of_an_exported_file_is_checked_before_the_export(model, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_csg.export._explained", None)
    with pytest.raises(ValueError, match=r"is a folder; name a file in it, such as .*model.onnx"):
        timm_csg.export_onnx(model, tmp_path)
    with pytest.raises(ValueError, match=r"the folder of .*model.onnx does not exist"):
        timm_csg.export_onnx(model, tmp_path / "nowhere" / "model.onnx")
