"""All commands see the same pixels and the same classes; pictures that cannot be read are named."""

import itertools
import logging

import numpy as np
import pytest
import timm
import torch
from cli.folders_of_pictures import fill, make_splits, picture, train
from PIL import Image

import timm_csg
from timm_csg import pictures
from timm_csg.cli import main
from timm_csg.cli.explain import explain
from timm_csg.pictures import convert, image_mode, read_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model of three classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=3))
    return str(timm_csg.save_pretrained(model, folder))


def logits(files, checkpoint):
    found = explain(files, checkpoint, output=None, img_size=32, device="cpu")
    return [each.why.standard.logit for each in found]


def test_explain_reads_16_bits_as_training_does(checkpoint, tmp_path):
    deep = (np.arange(1024).reshape(32, 32) * 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    one, other = logits([tmp_path / "deep.png", tmp_path / "flat.png"], checkpoint)
    assert one == other


def test_12_bits_in_16_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        convert(Image.fromarray(np.full((4, 4), 4095, np.uint16)), "L")
        convert(Image.fromarray(np.full((4, 4), 4095, np.uint16)), "L")
    assert caplog.text.count("your camera gives 12 bits") <= 1


def test_pictures_are_turned_upright(checkpoint, tmp_path):
    image = picture(size=(40, 20))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "phone.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    assert read_image(tmp_path / "phone.png", "RGB").size == (20, 40)
    one, other = logits([tmp_path / "phone.png", tmp_path / "upright.png"], checkpoint)
    assert one == other


def test_damaged_exif_data_are_overlooked():
    image = picture()
    image.info["exif"] = b"Exif\x00\x00nonsense"
    assert convert(image, "RGB").size == image.size


def test_a_model_of_four_channels_is_refused_before_it_is_trained(tmp_path, capsys):
    data = make_splits(tmp_path / "pets", ["cat", "dog"])
    assert train(data, tmp_path / "run", "--in-chans", "4") == 2
    assert "images of 4 channels, but pictures are read as grey (1) or RGB (3)" in capsys.readouterr().err
    assert (image_mode(1), image_mode(3)) == ("L", "RGB")


def test_a_huge_picture_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture().save(tmp_path / "scan.png")
    assert main(["explain", str(tmp_path / "scan.png"), "--checkpoint", checkpoint, "--img-size", "32"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"timm-csg explain: {tmp_path / 'scan.png'} cannot be read as an image (Image size (480")
    assert len(said.splitlines()) == 1


def test_one_damaged_picture_of_many_is_named_and_the_others_are_explained(checkpoint, tmp_path, capsys, caplog):
    fill(tmp_path / "in", 3)
    (tmp_path / "in" / "1.png").write_bytes(b"no picture")
    arguments = ["--checkpoint", checkpoint, "--img-size", "32", "--output", str(tmp_path / "out")]
    assert main(["explain", str(tmp_path / "in"), *arguments]) == 2
    assert f"{tmp_path / 'in' / '1.png'} cannot be read" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0_grad_cam.png", "2_grad_cam.png"]
    assert "2 pictures in" in capsys.readouterr().out


def test_pictures_of_equal_names_do_not_overwrite_one_another(checkpoint, tmp_path):
    files = [tmp_path / name for name in ("a.png", "sub/a.png", "a-2.png", "A.png", "a.bmp", "a_grad.png")]
    (tmp_path / "sub").mkdir()
    for seed, path in enumerate(files):
        picture(seed).save(path)
    methods = ["grad_cam", "cam"]
    found = explain(files, checkpoint, methods=methods, output=tmp_path / "out", img_size=32, device="cpu")
    written = list(itertools.chain.from_iterable(each.pictures for each in found))
    assert len({str(path).lower() for path in written}) == 2 * len(files)
    assert all(path.is_file() for path in written)


def test_a_missing_picture_names_the_one_spelled_alike(checkpoint, tmp_path, capsys):
    picture().save(tmp_path / "house.png")
    assert main(["explain", str(tmp_path / "huose.png"), "--checkpoint", checkpoint]) == 2
    assert "Did you mean 'house.png'?" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["²", "7", "cta"])
def test_an_unknown_target_is_one_sentence(target, checkpoint, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    arguments = ["--checkpoint", checkpoint, "--target", target, "--img-size", "32"]
    assert main(["explain", str(tmp_path / "a.png"), *arguments]) == 2
    assert f"there is no class {target!r}" in capsys.readouterr().err


def test_a_class_without_validation_images_is_known_to_every_command(tmp_path, monkeypatch, capsys):
    data = make_splits(tmp_path / "insects", ["ant", "bee", "cow"])
    for path in (data / "val" / "bee").iterdir():
        path.unlink()
    monkeypatch.chdir(tmp_path)
    assert train("insects", "run") == 0
    assert main(["evaluate", "run", "--metrics", "accuracy", "--output", "measured"]) == 0
    assert main(["report", "run"]) == 0
    (data / "val" / "bee").rmdir()
    assert main(["evaluate", "run", "--metrics", "accuracy", "--output", "again"]) == 0
    one, other = ((tmp_path / name / "metrics.json").read_text() for name in ("measured", "again"))
    assert '"bee"' in one
    assert one.partition('"seconds"')[0] == other.partition('"seconds"')[0]
    capsys.readouterr()
    assert main(["explain", "insects/val/ant/0.png", "--checkpoint", "run", "--target", "cow"]) == 0
    assert "cow" in capsys.readouterr().out


def test_training_knows_the_number_of_classes_of_a_folder(tmp_path, capsys):
    data = make_splits(tmp_path / "pets", ["cat", "dog"])
    assert train(data, tmp_path / "run", "--num-classes", "2") == 0
    arguments = ["--num-classes", "2", "--metrics", "accuracy", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(tmp_path / "run"), *arguments]) == 0
    assert train(data, tmp_path / "other", "--num-classes", "5") == 2
    assert "--num-classes is 5, but the data has 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(("largest", "warns"), [(4095, True), (4096, False)])
def test_12_bits_in_16_are_said_to_look_nearly_black(caplog, largest, warns):
    pictures._warn_of_dark_images.cache_clear()
    pixels = np.full((4, 4), 7, dtype=np.uint16)
    pixels[0, 0] = largest
    pictures.convert(Image.fromarray(pixels), "L")
    assert ("read as nearly black; if your camera gives 12 bits, save" in caplog.text) == warns
