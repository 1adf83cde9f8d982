"""GradMap, ActivMap and CAM against literal loops, and by hand."""

import functools
import math

import pytest
import torch
from reference import localisation as reference

import timm_csg
from timm_csg import measuring, metrics

NUM_CLASSES = 3
SHARE = 0.3
FEW = functools.partial(measuring.gradmap, filters_per_class=2)


@pytest.fixture
def animals():
    """Five images of three classes with boxes; the last class has one image."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(5, 3, 64, 64, generator=generator)
    targets = torch.tensor([0, 1, 1, 0, 2])
    corners = 20 * torch.rand(5, 2, generator=generator)
    boxes = torch.cat([corners, corners + 20 + 24 * torch.rand(5, 2, generator=generator)], dim=1)
    return images, targets, boxes


def loader(images, targets):
    return [(images[:3], targets[:3]), (images[3:], targets[3:])]


def maps(model, images):
    features = model.forward_features(images)
    nhwc = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
    return features.permute(0, 3, 1, 2).contiguous() if nhwc else features


def masks(boxes):
    return [reference.box_mask(box.tolist(), 64, 64) for box in boxes]


def check_per_image(found, scores, targets):
    for values, ours, total in (
        (scores, found.iou, found.total_iou),
        ([float(score >= 0.2) for score in scores], found.ap20, found.total_ap20),
        ([float(score >= 0.3) for score in scores], found.ap30, found.total_ap30),
    ):
        expected = torch.tensor(reference.means(values, targets.tolist(), NUM_CLASSES))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert total == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found.counts.tolist() == torch.bincount(targets).tolist()


def test_cam_is_the_literal_protocol(make_model, animals):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    found = measuring.cam_localisation(model, loader(images, targets), boxes)
    weight = model.get_classifier().weight.detach()
    scores = reference.cam(maps(model, images).detach(), weight, targets.tolist(), masks(boxes), SHARE)
    check_per_image(found, scores, targets)


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_activmap_is_the_literal_protocol(make_model, animals, name):
    model, (images, targets, boxes) = make_model(name, num_classes=NUM_CLASSES), animals
    found = measuring.activmap(model, loader(images, targets), boxes)
    truth = masks(boxes)
    expected = reference.activmap(maps(model, images).detach(), targets.tolist(), truth, SHARE, NUM_CLASSES)
    owners = [best for best, _, _ in expected]
    for column, ours, total in ((1, found.iou, found.total_iou), (2, found.ap30, found.total_ap30)):
        values = [row[column] for row in expected]
        mean = torch.tensor(reference.means(values, owners, NUM_CLASSES))
        torch.testing.assert_close(ours, mean, atol=1e-5, rtol=0, equal_nan=True)
        assert total == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found.counts.tolist() == [owners.count(index) for index in range(NUM_CLASSES)]


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_gradmap_is_the_literal_protocol(make_model, animals, name):
    model, (images, targets, boxes) = make_model(name, num_classes=NUM_CLASSES), animals
    found = measuring.gradmap(model, loader(images, targets), boxes, filters_per_class=4)
    activation = maps(model, images).detach().sum(dim=(2, 3))
    strongest = [
        sorted(range(activation.shape[1]), key=lambda kernel: -float(activation[targets == index, kernel].mean()))[:4]
        for index in range(NUM_CLASSES)
    ]
    truth = masks(boxes)
    scores = reference.gradmap(
        lambda image: maps(model, image), images, targets.tolist(), truth, strongest, 30 / 128 * 64, 1.0
    )
    check_per_image(found, scores, targets)


def test_masks_and_boxes_give_the_same(make_model, animals):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    as_masks = torch.stack(masks(boxes)).bool()
    for metric in (measuring.cam_localisation, measuring.activmap):
        assert metric(model, loader(images, targets), boxes).total_iou == pytest.approx(
            metric(model, loader(images, targets), as_masks).total_iou
        )


def test_activmap_in_several_readings_is_the_same(make_model, animals):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    once = measuring.activmap(model, loader(images, targets), boxes)
    often = measuring.activmap(model, loader(images, targets), boxes, max_bytes=5 * 4 * 4 * 20)
    torch.testing.assert_close(once.iou, often.iou, equal_nan=True)
    assert torch.equal(once.counts, often.counts)


def test_whole_image_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 2.0, 4.0], [math.nan] * 4])
    found = metrics.whole_image(boxes, torch.tensor([0, 1, 1]), (4, 4))
    assert found.iou.tolist() == [0.25, 0.5]
    assert (found.ap20.tolist(), found.ap30.tolist()) == ([1.0, 1.0], [0.0, 1.0])
    assert (found.total_iou, found.total_ap30) == (0.375, 0.5)
    assert found.counts.tolist() == [1, 1]


def test_a_silent_filter_predicts_everything_unless_only_positive_values_count(make_model, animals):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    everything = metrics.whole_image(boxes, targets, (64, 64))

    class Silent(type(model)):
        def forward_features(self, x):
            return 0 * super().forward_features(x)

    model.__class__ = Silent
    found = measuring.activmap(model, loader(images, targets), boxes)
    assert found.total_iou == pytest.approx(float(everything.iou[0]), abs=1e-6)  # the first of the classes that tie
    assert measuring.activmap(model, loader(images, targets), boxes, positive_only=True).total_iou == 0
    assert measuring.gradmap(model, loader(images, targets), boxes, filters_per_class=2).total_iou == 0


def test_cam_needs_an_average_and_a_linear_layer(make_model, animals):
    images, targets, boxes = animals
    for name in ("test_convnext", "test_mambaout"):
        with pytest.raises(ValueError, match=r"explain\.grad_cam"):
            measuring.cam_localisation(make_model(name, num_classes=NUM_CLASSES), loader(images, targets), boxes)


@pytest.mark.parametrize(
    "metric", [FEW, measuring.activmap, measuring.cam_localisation], ids=["gradmap", "activmap", "cam"]
)
def test_differentiated_models_are_measured_on_the_standard_path(make_model, gated, animals, metric):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    plain = metric(model, loader(images, targets), boxes)
    differentiated = gated(timm_csg.differentiate(model, mechanism="csg"))
    assert metric(differentiated, loader(images, targets), boxes).total_iou == pytest.approx(plain.total_iou)


@pytest.mark.parametrize(
    "metric", [FEW, measuring.activmap, measuring.cam_localisation], ids=["gradmap", "activmap", "cam"]
)
def test_model_is_left_as_found_and_progress_counts_images(make_model, animals, metric):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    model.train()
    before, counts = {name: value.clone() for name, value in model.state_dict().items()}, []
    metric(model, loader(images, targets), boxes, progress=counts.append)
    assert counts == [3, 2]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not images.requires_grad


@pytest.mark.parametrize(
    "metric", [FEW, measuring.activmap, measuring.cam_localisation], ids=["gradmap", "activmap", "cam"]
)
def test_objects_that_do_not_match_the_images_are_refused(make_model, animals, metric):
    model, (images, targets, boxes) = make_model(num_classes=NUM_CLASSES), animals
    with pytest.raises(ValueError, match="3 rows"):
        metric(model, loader(images, targets), boxes[:3])
    with pytest.raises(ValueError, match="10 rows"):
        metric(model, loader(images, targets), torch.cat([boxes, boxes]))
    with pytest.raises(ValueError, match="64 x 64"):
        metric(model, loader(images, targets), torch.ones(5, 32, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match="no image contains an object"):
        metric(model, loader(images, targets), torch.full((5, 4), math.nan))


def test_tokens_are_refused(make_model, animals):
    images, targets, boxes = animals
    with pytest.raises(ValueError, match="tokens instead of a feature map"):
        measuring.activmap(make_model("test_vit"), loader(images, targets), boxes)
