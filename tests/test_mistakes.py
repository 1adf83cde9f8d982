"""Mistakes of users: one sentence that says what to do, before anything is computed or written."""

import pytest
import timm
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


BOXES = torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 6)
OF_IMAGES = {
    "cam": lambda m, x, y: explain.cam(m, x),
    "grad_cam": lambda m, x, y: explain.grad_cam(m, x, y),
    "guided_grad_cam": lambda m, x, y: explain.guided_grad_cam(m, x),
    "owner_map": lambda m, x, y: explain.owner_map(m, x),
    "coarse_map": lambda m, x, y: explain.coarse_map(m, x),
    "gradient": lambda m, x, y: explain.gradient(m, x),
    "deconvnet": lambda m, x, y: explain.deconvnet(m, x),
    "evidence_map": lambda m, x, y: explain.evidence_map(m, x),
    "explain_prediction": lambda m, x, y: explain.explain_prediction(m, x),
    "filter_maps": lambda m, x, y: explain.filter_maps(m, x),
    "class_filters": lambda m, x, y: explain.class_filters(m, x),
    "contrast": lambda m, x, y: explain.contrast(m, x, 0, 1),
    "strongest_images": lambda m, x, y: explain.strongest_images(m, [x], [0, 1], top=2),
    "activation_counts": lambda m, x, y: explain.activation_counts(m, x),
    "factor_activation_map": lambda m, x, y: explain.factor_activation_map(m, x, 0),
    "effective_diameter": lambda m, x, y: measuring.effective_diameter(m, x),
}
OF_LABELLED = {
    "fgsm": lambda m, x, y: measuring.fgsm(m, x, y, eps=0.1),
    "pgd": lambda m, x, y: measuring.pgd(m, x, y, eps=0.1, steps=2),
    "judge": lambda m, x, y: judging.judge(explain.grad_cam, m, x, y, judges=["deletion"]),
    "random_logit": lambda m, x, y: judging.random_logit(explain.grad_cam, m, x, y),
    "weight_randomisation": lambda m, x, y: judging.weight_randomisation(explain.grad_cam, m, x, y),
    "stability": lambda m, x, y: judging.stability(explain.grad_cam, m, x, y),
    "grid_pointing_game": lambda m, x, y: judging.grid_pointing_game(explain.grad_cam, m, x, y),
    "probability_curve": lambda m, x, y: judging.probability_curve(m, x, y, x[:, 0]),
}
OF_LOADERS = {
    "collect": lambda m, x, y: measuring.collect(m, [(x, y)]),
    "ablate": lambda m, x, y: measuring.ablate(m, [(x, y)], torch.arange(96) % 3, 3),
    "collect_peaks": lambda m, x, y: measuring.collect_peaks(m, [(x, y)]),
    "part_interpretability": lambda m, x, y: measuring.part_interpretability(m, [(x, y)], BOXES[:, None]),
    "cam_localisation": lambda m, x, y: measuring.cam_localisation(m, [(x, y)], BOXES),
    "gradmap": lambda m, x, y: measuring.gradmap(m, [(x, y)], BOXES, filters_per_class=2),
    "activmap": lambda m, x, y: measuring.activmap(m, [(x, y)], BOXES),
    "measure": lambda m, x, y: measuring.measure(m, [(x, y)], ["accuracy"]),
    "embed": lambda m, x, y: judging.embed(m, [(x, y)]),
    "assign_filters": lambda m, x, y: timm_csg.assign_filters(m, [(x, y)]),
    "adapt": lambda m, x, y: timm_csg.adapt(m, [(x, y)]),
    "setup": lambda m, x, y: timm_csg.setup(m, lr=0.1, loader=[(x, y)]),
}


def with_bad_value(images, value):
    images = images.clone()
    images[4, 0, 0, 0] = value
    return images


WRONG_IMAGES = {
    "grey": (lambda x: x[:, :1], ValueError, r"ResNet takes images of 3 channels, not 1; pass images.expand\(-1, 3"),
    "four channels": (lambda x: torch.cat([x, x[:, :1]], 1), ValueError, "takes images of 3 channels, not 4"),
    "NaN": (lambda x: with_bad_value(x, torch.nan), ValueError, "1 of 6 hold NaN or infinity, the first is number 4"),
    "infinite": (lambda x: with_bad_value(x, -torch.inf), ValueError, "hold NaN or infinity, the first is number 4"),
    "one image": (lambda x: x[0], ValueError, "images must be .batch, channels, height, width."),
}


@pytest.fixture
def unused(model, monkeypatch):
    """A model whose backbone must not be asked."""
    monkeypatch.setattr(model, "forward_features", None)
    monkeypatch.setattr(model, "forward", None)
    return model


@pytest.mark.parametrize("mistake", WRONG_IMAGES)
@pytest.mark.parametrize("function", OF_IMAGES | OF_LABELLED | OF_LOADERS)
def test_images_that_do_not_suit_the_model_are_refused_before_a_pass(unused, given, function, mistake):
    change, error, text = WRONG_IMAGES[mistake]
    images, targets = given
    images = change(images)
    with pytest.raises(error, match=text):
        (OF_IMAGES | OF_LABELLED | OF_LOADERS)[function](unused, images, targets[: len(images)])


WRONG_TARGETS = {
    "too large": (lambda y: y + 5, ValueError, "class indices from 0 to 2, but they range from 5 to 7"),
    "negative": (lambda y: y - 1, ValueError, "but they range from -1 to 1; drop unlabelled samples"),
    "too many": (lambda y: torch.arange(9) % 3, ValueError, "one target for every image, but there are 9 for 6"),
    "too few": (lambda y: y[:4], ValueError, "one target for every image, but there are 4 for 6"),
    "floats": (lambda y: y.float(), TypeError, "an integer tensor of class indices, but got torch.float32"),
    "booleans": (lambda y: y.bool(), TypeError, "an integer tensor of class indices, but got torch.bool"),
    "a column": (lambda y: y[:, None], ValueError, "must have the shape .samples."),
}


@pytest.mark.parametrize("mistake", WRONG_TARGETS)
@pytest.mark.parametrize("function", [name for name in OF_LABELLED | OF_LOADERS if name != "embed"])
def test_targets_that_are_no_class_indices_are_refused_before_a_pass(unused, given, function, mistake):
    change, error, text = WRONG_TARGETS[mistake]
    if mistake == "a column" and function in ("assign_filters", "adapt", "setup"):
        pytest.skip("these take rows")
    with pytest.raises(error, match=text):
        (OF_LABELLED | OF_LOADERS)[function](unused, given[0], change(given[1]))


def test_number_of_a_bad_image_counts_all_batches(model, given):
    images, targets = given
    with pytest.raises(ValueError, match="the first is number 10"):
        measuring.collect(model, [(images, targets), (with_bad_value(images, torch.nan), targets)])


def test_a_batch_without_images_counts_for_nothing(model, given):
    images, targets = given
    seen = measuring.collect(model, [(images, targets), (images[:0], targets[:0])])
    assert torch.equal(seen.logits, measuring.collect(model, [given]).logits)
    with pytest.raises(ValueError, match="yielded no images"):
        measuring.collect(model, [(images[:0], targets[:0])])


def values(found):
    """All numbers of a result, flat."""
    if isinstance(found, torch.Tensor):
        return [found.double().flatten()]
    if isinstance(found, dict):
        found = list(found.values())
    return [part for one in found for part in values(one)] if isinstance(found, (tuple, list)) else []


@pytest.mark.parametrize("precision", [torch.float64, torch.float16])
@pytest.mark.parametrize("function", ["gradient", "factor_activation_map", "pgd", "collect", "activmap", "embed"])
def test_images_of_another_precision_are_taken_as_the_model_computes(model, given, function, precision):
    images, targets = given[0].half().float(), given[1]
    call = (OF_IMAGES | OF_LABELLED | OF_LOADERS)[function]
    expected, found = values(call(model, images, targets)), values(call(model, images.to(precision), targets))
    assert expected
    assert all(
        torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in zip(expected, found, strict=True)
    )


@pytest.mark.parametrize("precision", [torch.float16, torch.float64])
@pytest.mark.parametrize("function", [*OF_IMAGES, *OF_LOADERS, "pgd"])
def test_models_of_another_precision_are_measured_and_explained(model, given, function, precision):
    (OF_IMAGES | OF_LABELLED | OF_LOADERS)[function](model.to(precision), *given)


def test_pixels_for_a_model_of_fixed_size_are_counted(given):
    model = timm.create_model("test_vit", num_classes=3, dynamic_img_size=False)
    for call in (explain.gradient, lambda m, x: measuring.collect(m, [(x, given[1])])):
        with pytest.raises(ValueError, match="takes images of 160 x 160 pixels only, not 64 x 64; resize"):
            call(model, given[0])
    flexible = timm.create_model("test_vit", num_classes=3)
    assert explain.gradient(flexible, given[0]).shape == given[0].shape


def test_targets_in_a_list_are_named(model, given):
    with pytest.raises(TypeError, match=r"but are a list; pass torch\.as_tensor"):
        model(given[0], given[1].tolist(), paths=("gated",))


MEASURING = ["collect", "ablate", "collect_peaks", "part_interpretability", "gradmap", "activmap", "effective_diameter"]


@pytest.mark.parametrize("function", MEASURING)
@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (torch.nn.DataParallel, r"DataParallel has no forward_features.*pass the model inside, \.module"),
        (lambda model: timm.create_model("test_resnet", features_only=True), r"FeatureListNet has no .*create_model"),
        (lambda model: "resnet18", r"found str as the model; pass timm\.create_model"),
    ],
    ids=["wrapped", "features only", "name"],
)
def test_what_has_no_stage_and_head_is_refused(model, given, function, wrap, text):
    with pytest.raises(TypeError, match=text):
        (OF_IMAGES | OF_LOADERS)[function](wrap(model), *given)


def test_a_model_without_classes_is_not_measured(given):
    with pytest.raises(ValueError, match="ResNet has no classes to measure"):
        measuring.measure(timm.create_model("test_resnet", num_classes=0), [given], ["accuracy"])


def test_grey_models_have_fields_and_weights(given):
    mixes_all = timm.create_model("edgenext_xx_small", in_chans=1)
    assert measuring.receptive_field(mixes_all, 64).centre_y.tolist() == [16, 48]
    assert measuring.stage_weight(timm.create_model("test_resnet", in_chans=1)).weight.shape[0] == 96


def test_a_criterion_that_gives_a_number_for_each_image_is_named(model, given):
    loop = timm_csg.TrainingMixin()
    with pytest.raises(ValueError, match=r"criterion must return one number for the batch, but returns shape \[6\]"):
        loop.losses(model.train(), *given, torch.nn.CrossEntropyLoss(reduction="none"))


def test_targets_beyond_the_classes_that_are_counted_are_refused(model, given):
    with pytest.raises(ValueError, match="class indices from 0 to 1, but they range from 0 to 2"):
        measuring.ablate(model, [given], torch.arange(96) % 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x, y: explain.factor_maps(m, x, layer="layer4"), TypeError, "layer must be a module .* 'layer4'"),
        (lambda m, x, y: timm_csg.export_program(m, preprocessing={"input_size": (1, 64, 64)}), ValueError, "not 1"),
        (lambda m, x, y: timm_csg.export_program(m, preprocessing={"input_size": (64, 64)}), ValueError, "height and"),
        (lambda m, x, y: timm_csg.export_program(m, preprocessing={"input_size": (3, 0, 64)}), ValueError, "1 or more"),
        (
            lambda m, x, y: timm_csg.setup(m, lr=0.1, loader=[(x, y)], schedule="joint"),
            TypeError,
            "an Alternating or J",
        ),
        (lambda m, x, y: timm_csg.setup(m, lr=0.1, loader=[(x, y)], ema_decay=2), ValueError, "ema_decay must be .* 2"),
        (lambda m, x, y: timm_csg.param_groups(m, lr=0.1, layer_decay=-1), ValueError, "layer_decay must be .* -1"),
        (lambda m, x, y: measuring.collect(m, None), TypeError, "must yield batches, but is NoneType"),
        (lambda m, x, y: measuring.collect(m, torch.utils.data.TensorDataset(x, y)), TypeError, "pass a DataLoader"),
        (lambda m, x, y: measuring.activmap(m, [(x, y)], BOXES, share=2), ValueError, "share must be .* between 0 and"),
        (lambda m, x, y: measuring.cam_localisation(m, [(x, y)], BOXES, share=-1), ValueError, "share must be"),
        (
            lambda m, x, y: measuring.part_interpretability(m, [(x, y)], BOXES[:, None], share=2),
            ValueError,
            "share must be",
        ),
        (
            lambda m, x, y: measuring.gradmap(m, [(x, y)], BOXES, filters_per_class=0),
            ValueError,
            "filters_per_class must be a whole number, 1 or more, but is 0",
        ),
        (lambda m, x, y: measuring.pgd(m, x, y, eps=0.1, mean=[0] * 3, std=[1, 0, 1]), ValueError, "std must be more"),
        (lambda m, x, y: measuring.receptive_field("resnet18", 64), TypeError, "found str as the model"),
        (lambda m, x, y: measuring.stage_weight("resnet18"), TypeError, "found str as the model"),
        (lambda m, x, y: measuring.receptive_field(m, 0), ValueError, "image_size must be .* but is 0"),
        (lambda m, x, y: measuring.receptive_field(m, "64"), ValueError, "image_size must be .* but is '64'"),
    ],
)
def test_options_out_of_their_range_are_named_before_a_pass(unused, given, call, error, text):
    with pytest.raises(error, match=text):
        call(unused, *given)
