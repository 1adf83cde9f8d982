"""What newcomers write by mistake, each answered in one sentence that says what to write instead."""

import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import timm_csg
from timm_csg import explain, judging, measuring, plots

PICTURE = Image.new("RGB", (64, 64))


@pytest.fixture
def model(make_model):
    return timm_csg.differentiate(make_model(), mechanism="csg")


def losses(model, images, targets):
    return timm_csg.TrainingMixin().losses(model.train(), images, targets, F.cross_entropy)


@pytest.mark.parametrize("images", [PICTURE, "cat.jpg", np.zeros((64, 64, 3)), [PICTURE]])
def test_a_picture_in_place_of_a_tensor(model, targets, images):
    for call in (model, lambda images: losses(model, images, targets)):
        with pytest.raises(TypeError, match=r"images must be a tensor.*as_batch\(model, images\) makes one"):
            call(images)


def test_a_dictionary_in_place_of_a_tensor(model, images, targets):
    for call in (model, lambda batch: losses(model, batch, targets)):
        with pytest.raises(TypeError, match=r"a dictionary with 'pixel_values', 'labels'; pass the tensor in it"):
            call({"pixel_values": images, "labels": targets})


def test_labels_that_are_counted_from_1(model, images, targets):
    with pytest.raises(ValueError, match=r"class indices below 5, but the largest is 5.*counted from 0"):
        losses(model, images, torch.full_like(targets, 5))


def test_labels_of_another_type(model, images, targets):
    with pytest.raises(TypeError, match=r"whole numbers, but are torch.float32; call targets.long\(\)"):
        losses(model, images, targets.float())


def test_rows_of_targets_are_no_mistake(model, images, targets):
    assert losses(model, images, F.one_hot(targets, 5).float())["loss"].isfinite()


def test_only_the_first_batch_is_looked_at(model, images, targets, monkeypatch):
    loop = timm_csg.TrainingMixin()
    loop.losses(model.train(), images, targets, F.cross_entropy)
    monkeypatch.setattr("timm_csg.first_batch.warn_of_pixels", None)
    loop.losses(model.train(), images, targets, F.cross_entropy)


def test_pixels_from_0_to_255_in_training_and_measuring(model, images, targets, caplog):
    pixels = images.abs() / images.abs().max() * 255
    warning = "these are pixels from 0 to 255. Normalise them as the model expects"
    for run in (
        lambda given: losses(model, given, targets),
        lambda given: measuring.collect(model, [(given, targets)]),
    ):
        for given, expected in ((pixels, True), (images, False)):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                run(given)
            assert (warning in caplog.text) is expected


def test_a_recipe_in_place_of_a_number_or_a_mechanism(make_model):
    with pytest.raises(ValueError, match="is 'assigned'; a recipe is named: recipe='assigned'"):
        timm_csg.setup(make_model(), "assigned", lr=1e-3)
    with pytest.raises(ValueError, match="'paper' is a recipe, not a mechanism; pass recipe='paper'"):
        timm_csg.differentiate(make_model(), mechanism="paper")


def test_loader_and_model_in_the_wrong_order(model, images, targets):
    with pytest.raises(TypeError, match="expected a model first, then the images, but found list as the model"):
        measuring.collect([(images, targets)], model)


def test_explanation_and_model_in_the_wrong_order(model, images, targets):
    with pytest.raises(TypeError, match="the explanation first, then a model, but found function there"):
        judging.judge(model, explain.grad_cam, images, targets)


def test_pictures_without_headings(images):
    with pytest.raises(TypeError, match=r"columns must be a dictionary from headings to pictures.*but are Tensor"):
        plots.map_figure(images)


def test_proxies_of_a_trace_are_no_mistake():
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5)).eval()
    traced = torch.jit.trace(model, torch.zeros(1, 3, 64, 64))
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(traced(images), model(images))


def test_dir_shows_what_is_public_only():
    shown = {name for name in dir(timm_csg) if not name.startswith("__")}
    assert shown == {*timm_csg.__all__, "explain", "judging", "measuring", "metrics", "plots", "recipes"} - {
        "__version__"
    }
