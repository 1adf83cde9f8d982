"""timm-csg explain: pictures and the table agree with explain_prediction, and what goes wrong."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_csg
from timm_csg import explain as explain_package
from timm_csg.cli import main
from timm_csg.cli.explain import explain
from timm_csg.cli.explain_view import explanation_table


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=4), mechanism="assigned")
    return str(timm_csg.save_pretrained(model, tmp_path_factory.mktemp("model")))


@pytest.fixture
def picture(tmp_path):
    pixels = torch.randint(0, 256, (80, 100, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_explanation_is_that_of_the_package(checkpoint, picture):
    found = explain([picture], checkpoint, output=None, img_size=64, top=3)
    assert found[0].pictures == []
    model = timm_csg.from_pretrained(checkpoint)
    config = timm.data.resolve_data_config({"img_size": 64}, pretrained_cfg=model.pretrained_cfg)
    image = timm.data.create_transform(**config)(Image.open(picture).convert("RGB"))
    expected = explain_package.explain_prediction(model, image[None], top=3)[0]
    assert found[0].why.target == expected.target
    for ours, theirs in zip(found[0].why.filters, expected.filters, strict=True):
        assert ours.filter == theirs.filter
        assert ours.contribution == pytest.approx(theirs.contribution, rel=1e-4)


def test_every_map_becomes_a_picture_large_enough_to_see(checkpoint, picture, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["explain", str(picture), "--checkpoint", checkpoint, "--img-size", "64", "--output", str(output)]
    assert main([*command, "--method", "grad-cam,gradient,guided_backprop,filters", "--top", "2"]) == 0
    names = {path.name for path in output.iterdir()}
    assert {"photo_grad_cam.png", "photo_gradient.png", "photo_guided_backprop.png"} < names
    assert sum(name.startswith("photo_filter") for name in names) == 2
    assert all(Image.open(path).size == (256, 256) for path in output.iterdir())
    out = capsys.readouterr().out
    assert "photo.png" in out
    assert "5 pictures" in out


def test_one_pixel_does_not_hide_the_others_of_a_pixel_map(checkpoint, picture, monkeypatch, tmp_path):
    heat = torch.ones(1, 3, 64, 64)
    heat[0, :, 5, 5] = 1000
    heat[0, :, 32:] = 0
    monkeypatch.setattr(explain_package, "gradient", lambda *_: heat)
    explain([picture], checkpoint, methods=["gradient"], output=tmp_path, img_size=64)
    drawn = torch.from_numpy(np.asarray(Image.open(tmp_path / "photo_gradient.png")).copy()).float()
    assert drawn[:100, :, 2].mean() < drawn[150:, :, 2].mean() - 50  # yellow, against the picture as it is


def test_two_files_of_one_name_keep_their_pictures_apart(checkpoint, picture, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / picture.name
    other.write_bytes(picture.read_bytes())
    found = explain([picture, other], checkpoint, output=tmp_path / "out", img_size=64)
    assert [path.name for each in found for path in each.pictures] == ["photo_grad_cam.png", "photo-2_grad_cam.png"]


def test_class_can_be_asked_for(checkpoint, picture):
    assert explain([picture], checkpoint, output=None, img_size=64, target="3")[0].why.target == 3


def test_table_has_a_row_for_each_filter_and_the_sum_of_its_own(checkpoint, picture):
    found = explain([picture], checkpoint, output=None, img_size=64, top=2)
    assert explanation_table(found).row_count == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "--method must be one of 'evidence_map', "),
        (["--target", "cat"], "there is no class 'cat'"),
        (["--top", "0"], "--top must be at least 1, but is 0"),
        (["--method", ","], "no method is named; there are evidence_map"),
    ],
)
def test_wrong_option_is_one_sentence_and_exit_2(options, message, checkpoint, picture, capsys, tmp_path):
    command = ["explain", str(picture), "--checkpoint", checkpoint, "--img-size", "64", "--output", str(tmp_path / "o")]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_file_that_is_no_picture_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / "notes.png").write_text("no picture")
    assert main(["explain", str(tmp_path / "notes.png"), "--checkpoint", checkpoint, "--img-size", "64"]) == 2
    assert "notes.png" in capsys.readouterr().err.replace("\n", "")


def test_two_classes_are_set_against_each_other(checkpoint, picture, tmp_path, capsys):
    found = explain([picture], checkpoint, output=None, img_size=64, target=2, against="1", top=3)[0]
    outcome = found.versus
    assert (found.answer, outcome.classes, outcome.filters.shape) == ("2", (2, 1), (1, 3))
    assert float(outcome.contribution.sum() + outcome.constant[0]) == pytest.approx(float(outcome.difference[0]))
    command = ["explain", str(picture), "--checkpoint", checkpoint, "--img-size", "64", "--output", str(tmp_path / "o")]
    assert main([*command, "--target", "2", "--against", "1", "--top", "3"]) == 0
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"photo_grad_cam.png", "photo_versus.png"}
    out = capsys.readouterr().out
    assert "2 / 1" in out
    assert f"{float(outcome.difference[0]):+.2f}" in out


def test_class_against_itself_is_set_against_the_most_probable_other(checkpoint, picture):
    why = explain([picture], checkpoint, output=None, img_size=64)[0].why
    found = explain([picture], checkpoint, output=None, img_size=64, against=why.predicted)[0]
    assert found.versus.classes[1] == why.predicted
    assert found.versus.difference < 0
