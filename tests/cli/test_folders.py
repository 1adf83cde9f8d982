"""What a folder of pictures means: its classes, what is left out, and the part that is held out for validation."""

import json
import logging
import os

import pytest
from cli.folders_of_pictures import fill, make_splits, picture, train
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from timm_csg.cli import main
from timm_csg.cli.folders import PictureFolder
from timm_csg.pictures import shown


def names(root, **options):
    return [path[len(str(root)) + 1 :] for path, _ in PictureFolder(root, **options).samples]


def test_classes_and_order_are_those_of_timm(tmp_path):
    for name in ("b10", "b9", "a/deep", "C"):
        fill(tmp_path / name, 12)
    samples, classes = find_images_and_targets(str(tmp_path))
    found = PictureFolder(tmp_path)
    assert (found.samples, found.class_to_idx) == (samples, classes)


def test_hidden_folders_and_those_of_macos_are_no_classes_and_are_named(tmp_path, caplog):
    fill(tmp_path / "cat")
    fill(tmp_path / "dog")
    for hidden in ("cat/.ipynb_checkpoints", ".thumbnails", "__MACOSX/cat"):
        fill(tmp_path / hidden, 2)
    with caplog.at_level(logging.WARNING):
        assert list(PictureFolder(tmp_path).class_to_idx) == ["cat", "dog"]
    assert "hidden folders: 3, such as" in caplog.text


@pytest.mark.parametrize("suffix", ["webp", "tif", "bmp", "gif", "JPG", "avif"])
def test_every_kind_that_pillow_reads_is_a_picture(suffix, tmp_path):
    Image.init()
    if Image.registered_extensions().get(f".{suffix.lower()}") not in Image.OPEN:
        pytest.skip(f"this Pillow reads no {suffix}")
    fill(tmp_path / "cat", 3, suffix)
    assert len(PictureFolder(tmp_path)) == 3


def test_other_files_are_counted_and_named(tmp_path, caplog):
    fill(tmp_path / "cat")
    for index in range(3):
        (tmp_path / "cat" / f"{index}.heic").touch()
    (tmp_path / "cat" / ".DS_Store").touch()
    picture().save(tmp_path / "cover.png")
    with caplog.at_level(logging.WARNING):
        assert len(PictureFolder(tmp_path)) == 4
    expected = ".heic files: 3, such as cat/0.heic; pictures beside the class folders: 1, such as cover.png"
    assert caplog.messages == [f"ignored in {tmp_path}: {expected}"]


def test_a_folder_without_pictures_says_what_is_there(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.heic").touch()
    with pytest.raises(ValueError, match=r"no subfolder with pictures.*\.heic files: 1, such as cat/0\.heic"):
        PictureFolder(tmp_path)


def test_equal_names_below_different_folders_are_refused(tmp_path):
    for bird in ("hawk", "owl"):
        fill(tmp_path / bird / "male", 2)
    with pytest.raises(ValueError, match="several classes named 'male': hawk/male, owl/male; rename"):
        PictureFolder(tmp_path)


def test_pictures_beside_a_folder_of_pictures_are_refused(tmp_path):
    fill(tmp_path / "cat")
    fill(tmp_path / "cat" / "more")
    with pytest.raises(ValueError, match="cat holds pictures and also the folder more with pictures"):
        PictureFolder(tmp_path)


def test_a_link_to_a_folder_above_is_left_out_and_others_are_followed(tmp_path):
    fill(tmp_path / "data" / "cat")
    fill(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    found = PictureFolder(tmp_path / "data")
    assert (list(found.class_to_idx), len(found), found.empty) == (["cat", "dog"], 8, [])


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_links_that_go_round_are_left_out(tmp_path, caplog):
    fill(tmp_path / "cat")
    fill(tmp_path / "dog")
    for name, other in (("x", "y"), ("y", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other").symlink_to(f"../{other}")
    assert list(PictureFolder(tmp_path).class_to_idx) == ["cat", "dog"]
    assert "links to a folder above: 2, such as x/other/other" in caplog.text


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_a_class_that_is_another_one_by_a_link_is_refused(tmp_path):
    fill(tmp_path / "cat")
    fill(tmp_path / "dog")
    (tmp_path / "kitten").symlink_to("cat")
    with pytest.raises(ValueError, match=r"kitten is cat by another name \(a link\).* two classes; remove the link"):
        PictureFolder(tmp_path)


def test_names_are_text_that_every_place_can_hold(tmp_path):
    assert shown("cafe\u0301") == "café"
    assert shown("a\x1b[31m\n") == "a\\x1b[31m\\n"
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(raw)  # noqa: PTH102  the name is no text
    picture().save(os.fsdecode(raw + b"/0.png"))
    assert list(PictureFolder(tmp_path).class_to_idx) == ["caf\\xe9"]


def test_a_class_name_that_is_not_utf8_trains_and_is_in_every_file(tmp_path):
    make_splits(tmp_path / "menu", ["bar", "cafe"])
    for split in ("train", "val"):
        os.rename(tmp_path / "menu" / split / "cafe", os.fsencode(tmp_path / "menu" / split) + b"/caf\xe9")  # noqa: PTH104
    assert train(tmp_path / "menu", tmp_path / "run") == 0
    assert (tmp_path / "run" / "figures" / "gate_assigned.png").is_file()
    assert "caf\\xe9" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_part_is_held_out_of_every_class(tmp_path):
    for name, count in (("cat", 10), ("dog", 5), ("fox", 2)):
        fill(tmp_path / name, count)
    validation = names(tmp_path, fraction=0.2)
    rest = names(tmp_path, fraction=0.2, is_training=True)
    assert [sum(name in path for path in validation) for name in ("cat", "dog", "fox")] == [2, 1, 1]
    assert sorted(validation + rest) == sorted(names(tmp_path))
    assert names(tmp_path, fraction=0.2) == validation
    assert names(tmp_path, fraction=0.2, seed=1) != validation


def test_one_picture_cannot_be_divided(tmp_path):
    fill(tmp_path / "cat", 1)
    with pytest.raises(ValueError, match="only one picture; --val-fraction needs two or more"):
        PictureFolder(tmp_path, fraction=0.2)


def test_a_flat_folder_trains_and_is_measured_on_the_same_part_later(tmp_path, monkeypatch, capsys):
    for place, name in enumerate(("cat", "dog")):
        fill(tmp_path / "pets" / name, 12, seed=100 * place)
    monkeypatch.chdir(tmp_path)
    assert train("pets", "run") == 2
    assert "--val-fraction 0.2" in capsys.readouterr().err
    assert train("pets", "run", "--val-fraction", "0.25") == 0
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["val_fraction"] == 0.25
    assert main(["evaluate", "run", "--metrics", "accuracy", "--output", "measured", "--quiet"]) == 0
    measured = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert measured["images"] == 6
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert measured["checkpoints"]["assigned"]["accuracy"] == trained["assigned"]["accuracy"]


def test_a_folder_with_validation_images_is_not_divided(tmp_path, capsys):
    make_splits(tmp_path / "pets", ["cat", "dog"])
    assert train(tmp_path / "pets", tmp_path / "run", "--val-fraction", "0.2") == 2
    assert f"but found {tmp_path / 'pets' / 'val'}" in capsys.readouterr().err
