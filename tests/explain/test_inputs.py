"""Whatever shows a picture is explained as the tensor that timm's own transform makes of it."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_csg
from timm_csg import explain


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture
def picture(pixels):
    return Image.fromarray(pixels)


@pytest.fixture
def expected(tiny_model, picture):
    config = resolve_data_config({}, model=tiny_model)
    return create_transform(**config, is_training=False)(picture)[None]


@pytest.fixture
def file(tmp_path, picture):
    picture.save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_file_names_pillow_images_and_arrays_are_the_same_picture(tiny_model, pixels, picture, file, expected):
    channels_first = pixels.transpose(2, 0, 1)
    kinds = [
        file, str(file), picture, pixels, channels_first, pixels / 255, pixels.astype(np.int64), pixels[None],
        torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(pixels)[None],
        (pixels / 255).astype(np.float32), [picture], [str(file)],
    ]  # fmt: skip
    for kind in kinds:
        torch.testing.assert_close(explain.as_batch(tiny_model, kind), expected, rtol=0, atol=0)


def test_lists_mix_kinds_and_keep_their_order(tiny_model, picture, file, expected):
    black = Image.new("RGB", (90, 90))
    batch = explain.as_batch(tiny_model, [black, str(file), expected[0], expected])
    assert batch.shape == (4, 3, 160, 160)
    assert torch.equal(batch[1:], expected.expand(3, -1, -1, -1))
    assert len(batch[0].unique()) == 1


def test_folder_is_read_in_the_order_of_names(tiny_model, tmp_path):
    for name, colour in (("b.png", 200), ("a.jpg", 20), ("below/c.png", 100)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 70), (colour,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    batch = explain.as_batch(tiny_model, tmp_path)
    means = batch.mean(dim=(1, 2, 3))
    assert len(batch) == 3
    assert means.argsort().tolist() == [0, 2, 1]
    strongest = explain.strongest_images(tiny_model, tmp_path, [0, 3], top=2)
    assert torch.equal(strongest.indices, explain.strongest_images(tiny_model, [batch], [0, 3], top=2).indices)


def test_transparent_grey_and_palette_pictures_become_what_the_model_takes(make_model, pixels):
    for mode in ("RGBA", "L", "P", "1"):
        assert explain.as_batch(make_model(), Image.fromarray(pixels).convert(mode)).shape == (1, 3, 160, 160)
    grey = explain.as_batch(make_model(in_chans=1), pixels)
    assert grey.shape == (1, 1, 160, 160)
    assert -1 <= float(grey.min()) < 0 < float(grey.max()) <= 1
    assert explain.as_batch(make_model("test_vit"), pixels[:, :, 0]).shape == (1, 3, 64, 64)


def test_preprocessing_of_the_checkpoint_is_used(tmp_path, make_model, picture):
    model = timm_csg.differentiate(make_model())
    given = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0}
    timm_csg.save_pretrained(model, tmp_path / "model", preprocessing=given)
    batch = explain.as_batch(timm_csg.from_pretrained(tmp_path / "model"), picture)
    transform = create_transform(
        (3, 48, 48), mean=given["mean"], std=given["std"], crop_pct=1.0, interpolation="bilinear"
    )
    torch.testing.assert_close(batch, transform(picture)[None], rtol=0, atol=0)


METHODS = {
    "cam": {}, "grad_cam": {}, "coarse_map": {}, "guided_grad_cam": {}, "gradient": {}, "deconvnet": {},
    "guided_backprop": {}, "filter_maps": {"filters": [1, 2]}, "factor_maps": {"factors": [0]},
    "factor_activation_map": {},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_pictures(name, make_model, picture, expected):
    method, options = getattr(explain, name), METHODS[name]
    assert torch.equal(method(make_model(), picture, **options), method(make_model(), expected, **options))


@pytest.mark.parametrize("name", ["owner_map", "evidence_map", "guided_evidence_map"])
def test_maps_of_own_filters_take_pictures(name, make_model, picture, expected):
    method, model = getattr(explain, name), timm_csg.differentiate(make_model())
    assert torch.equal(method(model, picture), method(model, expected))


def test_reasons_and_counts_take_pictures(make_model, picture, expected):
    model = timm_csg.differentiate(make_model())
    from_picture, from_tensor = (
        explain.explain_prediction(model, picture)[0],
        explain.explain_prediction(model, expected)[0],
    )
    assert from_picture.standard.logit == from_tensor.standard.logit
    assert torch.equal(from_picture.filters[0].map, from_tensor.filters[0].map)
    assert explain.activation_counts(model, picture) == explain.activation_counts(model, expected)
    assert torch.equal(explain.class_filters(model, picture).filters, explain.class_filters(model, expected).filters)
    assert torch.equal(explain.contrast(model, picture, 0, 1).map, explain.contrast(model, expected, 0, 1).map)


@pytest.fixture
def named(tiny_model):
    tiny_model.pretrained_cfg["label_names"] = ["ant", "bee", "cat", "dog", "eel"]
    return tiny_model


def test_classes_are_found_by_name(named, images):
    for method in (explain.grad_cam, explain.gradient, explain.guided_backprop):
        assert torch.equal(method(named, images, "cat"), method(named, images, 2))
        assert torch.equal(method(named, images, ["eel", "ant", "cat"]), method(named, images, [4, 0, 2]))
        assert torch.equal(method(named, images, ["eel", 0, "cat"]), method(named, images, [4, 0, 2]))
    assert explain.explain_prediction(named, images, "dog")[0].target == 3
    assert explain.class_filters(named, images, "dog").targets.tolist() == [3, 3, 3]


def test_unknown_names_of_classes_are_answered(named, make_model, images):
    with pytest.raises(ValueError, match=r"no class 'cot'. Did you mean 'cat'"):
        explain.grad_cam(named, images, "cot")
    with pytest.raises(ValueError, match=r"no class 'xyz'; the model has ant, bee, cat, dog, eel"):
        explain.grad_cam(named, images, "xyz")
    with pytest.raises(ValueError, match="has no names of its classes; pass an index"):
        explain.grad_cam(make_model(), images, "cat")


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (torch.full((1, 3, 64, 64), 128.0), ValueError, "pixels from 0 to 255"),
        ([torch.full((3, 64, 64), 128.0)], ValueError, "pixels from 0 to 255"),
        (np.full((64, 64, 3), 128.0), ValueError, r"has 128 to 128; pass array.astype\('uint8'\)"),
        (np.full((64, 64, 3), -1.0), ValueError, "pass a tensor .* if it is normalised already"),
        (np.full((64, 64, 3), 300), ValueError, "values from 0 to 255, but has 300"),
        (np.zeros((64, 64, 7), np.uint8), ValueError, r"1, 3 or 4 channels, but has shape \[64, 64, 7\]"),
        (np.zeros((64, 64, 3), bool), TypeError, "holds bool"),
        ({"pixels": torch.zeros(2, 3, 64, 64), "labels": torch.zeros(2)}, TypeError, r"pass batch\['pixels'\]"),
        ((torch.zeros(2, 3, 64, 64), torch.tensor([0, 1])), TypeError, r"pass batch\[0\], and batch\[1\] as targets"),
        ([], ValueError, "at least one image"),
        ("nowhere/cat.jpg", ValueError, "there is no picture nowhere/cat.jpg"),
        ([torch.zeros(3, 64, 64), torch.zeros(3, 32, 32)], ValueError, "all images must have the same size"),
        (None, TypeError, "found NoneType"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_gets_a_sentence(tiny_model, bad, error, says):
    with pytest.raises(error, match=says):
        explain.grad_cam(tiny_model, bad)


def test_misspelt_and_unreadable_files_are_named(tiny_model, file, tmp_path):
    with pytest.raises(ValueError, match=r"Did you mean 'cat.png'"):
        explain.cam(tiny_model, tmp_path / "cats.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad.png cannot be read as an image"):
        explain.cam(tiny_model, tmp_path / "bad.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        explain.cam(tiny_model, tmp_path / "empty")


def test_folders_of_many_pictures_are_taken_in_parts(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_csg.explain.inputs.MOST_PICTURES", 2)
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="holds 3 pictures, and 2 are explained at once"):
        explain.cam(tiny_model, tmp_path)


def test_models_whose_pixels_reach_255_take_them(make_model):
    model = make_model()
    model.pretrained_cfg |= {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
    assert explain.grad_cam(model, torch.full((1, 3, 64, 64), 200.0)).shape == (1, 64, 64)


def test_models_without_preprocessing_take_tensors_only(tiny_net, picture):
    with pytest.raises(TypeError, match="TinyNet does not say how its pictures are prepared"):
        explain.gradient(tiny_net(), Image.new("L", (2, 1)))


def test_models_without_memory_take_images_without_memory(make_model):
    assert explain.activation_counts(make_model().to("meta"), torch.zeros(1, 3, 64, 64, device="meta")) == {"ReLU": 12}
