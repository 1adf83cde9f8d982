"""Data sets as people have them: odd image modes work, damaged files and wrong classes are named."""

import logging

import numpy as np
import pytest
from PIL import Image

from timm_csg.cli import main
from timm_csg.cli import train as train_module
from timm_csg.cli.build import data_config
from timm_csg.cli.data import load_data
from timm_csg.cli.distributed import Processes
from timm_csg.cli.images import CheckedImages
from timm_csg.cli.settings import TrainSettings
from timm_csg.pictures import ImageError, convert

OPTIONS = {"model": "test_resnet", "img_size": 32, "workers": 0, "batch_size": 4, "epochs": 1, "device": "cpu"}


def picture(shade=100, size=(20, 24)):
    return Image.new("RGB", size, (shade, shade, 255 - shade))


@pytest.fixture
def pictures(tmp_path):
    """Folders train/ and val/ with classes a, b and c of four and two pictures."""
    for split, count in (("train", 4), ("val", 2)):
        for name in "abc":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                picture(60 * "abc".index(name) + index).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path / "data"


def load(folder, **options):
    settings = TrainSettings(data=f"folder:{folder}", **OPTIONS | options).resolved()
    return load_data(settings, data_config(settings), Processes())


def train(folder, output, *arguments, **options):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | options).items()]
    return main(["train", "--output", str(output), "--data", str(folder), *options, *arguments])


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_grey_palette_cmyk_transparent_16_bit_and_1x1_images_train(pictures, tmp_path):
    kinds = [picture().convert(mode) for mode in ("L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr")]
    kinds += [Image.fromarray(np.full((9, 9), 40_000, np.uint16)), picture(size=(1, 1)), picture(size=(1, 300))]
    for number, image in enumerate(kinds):
        image.save(pictures / "train" / "a" / f"kind{number}.tif")
        image.save(pictures / "val" / "b" / f"kind{number}.tif")
    assert train(pictures, tmp_path / "out") == 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_16_bits_of_grey_keep_their_shades(mode):
    image = Image.fromarray(np.array([[0, 257 * 100, 257 * 255]], np.uint16))
    assert np.asarray(convert(image, mode).convert("L")).tolist() == [[0, 100, 255]]


def test_32_bit_pixels_are_refused():
    with pytest.raises(ValueError, match="32-bit numbers"):
        convert(Image.fromarray(np.zeros((2, 2), np.float32)), "RGB")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_image_is_named_in_one_sentence(split, workers, pictures, tmp_path, capsys):
    damaged = pictures / split / "b" / "1.png"
    truncate(damaged)
    assert train(pictures, tmp_path / "out", workers=workers) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert f"timm-csg train: {damaged} cannot be read as an image" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_file_that_is_no_image_is_named(content, pictures):
    (pictures / "val" / "c" / "0.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"val/c/0\.png cannot be read as an image"):
        list(load(pictures).validation)


def test_state_survives_an_image_damaged_on_the_way(pictures, tmp_path, monkeypatch):
    def interrupt(self, training, row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_epoch", interrupt)
        assert train(pictures, tmp_path / "out", epochs=2) == 130
    state = tmp_path / "out" / "assigned" / "state.pt"
    before, image = state.read_bytes(), (pictures / "val" / "a" / "0.png").read_bytes()
    truncate(pictures / "val" / "a" / "0.png")
    assert main(["train", "--resume", str(tmp_path / "out")]) == 2
    assert state.read_bytes() == before
    (pictures / "val" / "a" / "0.png").write_bytes(image)
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0


def test_class_without_validation_images_leaves_the_other_labels_as_they_are(pictures, caplog):
    for path in (pictures / "val" / "b").iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING):
        data = load(pictures)
    assert "no images of: b" in caplog.text
    assert [label for _, labels in data.validation for label in labels.tolist()] == [0, 0, 2, 2]


def test_run_with_a_class_without_validation_images_ends_well(pictures, tmp_path):
    for path in (pictures / "val" / "b").iterdir():
        path.unlink()
    assert train(pictures, tmp_path / "out") == 0
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()


def test_class_that_only_validation_has_is_named(pictures):
    (pictures / "val" / "c").rename(pictures / "val" / "sea")
    with pytest.raises(ValueError, match=r"classes missing from the training split: sea"):
        load(pictures)


def test_class_folder_without_images_is_named(pictures):
    (pictures / "train" / "bear").mkdir()
    (pictures / "train" / ".ipynb_checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"train has folders without images: bear; fill or remove"):
        load(pictures)


def test_one_class_is_refused(pictures):
    for name in "bc":
        (pictures / "train" / name).rename(pictures / name)
    with pytest.raises(ValueError, match=r"has only one class \(a\)"):
        load(pictures)


@pytest.mark.parametrize(
    ("label", "message"), [(3, "image 0 of list has label 3, but with 3 classes labels end at 2"), (None, "no label")]
)
def test_label_out_of_range_is_named(label, message):
    with pytest.raises(ImageError, match=message):
        CheckedImages([(picture(), label)], num_classes=3)[0]
