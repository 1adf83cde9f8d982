"""Annotations: both formats, errors that say where, and landmarks that land on the pixel they mark."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torchvision import transforms

from timm_csg.cli.images import CheckedImages
from timm_csg.measuring import Geometry, input_geometry, read_annotations
from timm_csg.measuring.marked import read_for

WIDE = """file,label,width,height,box_x0,box_y0,box_x1,box_y1,head_x0,head_y0,head_x1,head_y1,tail_x,tail_y
cat/1.jpg,cat,200,100,10,10,110,90,20,10,40,50,100,80
cat/2.jpg,cat,100,200,0,0,100,200,,,,,5,6
"""
ANIMALS = Path(__file__).parents[2].parent / "shared" / "data" / "animalparts"


def write(folder, text, name="annotations.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_wide_table_gives_boxes_points_and_centres(tmp_path):
    found = read_annotations(write(tmp_path, WIDE))
    assert found.files == ("cat/1.jpg", "cat/2.jpg")
    assert found.box_names == ("box", "head")
    assert found.point_names == ("tail", "head")
    assert found.points[0].tolist() == [[100, 80], [30, 30]]
    assert found.points[1, 0].tolist() == [5, 6]
    assert found.points[1, 1].isnan().all()
    assert found.object_boxes().tolist() == [[10, 10, 110, 90], [0, 0, 100, 200]]
    names, boxes = found.part_boxes()
    assert names == ("head",)
    assert boxes[0, 0].tolist() == [20, 10, 40, 50]
    assert found.sizes.tolist() == [[200, 100], [100, 200]]


def test_one_row_for_each_point(tmp_path):
    text = "image,part,x,y\na.png,eye,1,2\nb.png,eye,3.5,4\na.png,ear,5,6\n"
    found = read_annotations(write(tmp_path, text))
    assert found.files == ("a.png", "b.png")
    assert found.point_names == ("eye", "ear")
    assert found.points[:, 0].tolist() == [[1, 2], [3.5, 4]]
    assert found.points[1, 1].isnan().all()
    assert found.boxes.shape == (2, 0, 4)


def test_json_holds_the_same_as_the_table(tmp_path):
    records = [
        {"file": "cat/1.jpg", "label": "cat", "width": 200, "height": 100, "box": [10, 10, 110, 90],
         "head": [20, 10, 40, 50], "tail": [100, 80]},
        {"file": "cat/2.jpg", "width": 100, "height": 200, "box": [0, 0, 100, 200], "head": None, "tail": [5, 6]},
    ]  # fmt: skip
    found = read_annotations(write(tmp_path, json.dumps(records), "a.json"))
    table = read_annotations(write(tmp_path, WIDE))
    assert (found.files, found.box_names, found.point_names) == (table.files, table.box_names, table.point_names)
    for name in ("boxes", "points", "sizes"):
        torch.testing.assert_close(getattr(found, name), getattr(table, name), equal_nan=True)


def test_json_with_several_objects_takes_the_main_one(tmp_path):
    objects = [{"eye": [1, 2], "main": False}, {"eye": [3, 4], "main": True}]
    found = read_annotations(write(tmp_path, json.dumps([{"file": "a", "objects": objects}]), "a.json"))
    assert found.points.tolist() == [[[3, 4]]]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name,part,x,y\n", "line 1: no column 'file' or 'image'"),
        ("file,label\na,b\n", "line 1: no landmarks"),
        ("file,head_x,head_y0\n", "line 1, column 'head_x': it needs a column 'head_y'"),
        (
            "file,head_x,head_y\na,1,2\nb,1,two\n",
            "line 3, column 'head_y': expected a number of pixels, but found 'two'",
        ),
        ("file,head_x,head_y\na,1,\n", "line 2, column 'head_y' is empty"),
        ("file,head_x,head_y\na,1,2\na,1,2\n", "line 3, column 'file': 'a' appears twice"),
        ("file,head_x,head_y\n,1,2\n", "line 2, column 'file': the name of the picture is empty"),
        ("file,h_x0,h_y0,h_x1,h_y1\na,5,5,4,9\n", "line 2, column 'h_x0': a box is x0, y0, x1, y1"),
        ("file,part,x,y\na,eye,1,2\na,eye,3,4\n", "line 3, column 'part': 'a' has the part 'eye' twice"),
        ("file,part,x,y\n", "at least one row"),
    ],
)
def test_errors_name_line_and_column(tmp_path, text, where):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"annotations\.csv") as caught:
        read_annotations(path)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", "line 1, column 2: not JSON"),
        ("{}", "expected a list"),
        ("[1]", "record 0"),
        ('[{"file": "a", "eye": [1, "x"]}]', "record 0, key 'eye': expected a number"),
        ('[{"file": "a", "head": [5, 5, 4, 9]}]', "record 0, key 'head': a box is"),
        ('[{"file": "a", "objects": 3}]', "record 0, key 'objects'"),
    ],
)
def test_errors_in_json_name_the_record(tmp_path, text, where):
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        read_annotations(write(tmp_path, text, "a.json"))
    assert where in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.csv or \.json"):
        read_annotations(tmp_path / "a.xml")


def test_pictures_are_brought_into_the_loaders_order(tmp_path):
    found = read_annotations(write(tmp_path, WIDE))
    turned = found.select(["cat/2.jpg", "cat/1.jpg"])
    torch.testing.assert_close(turned.points, found.points.flip(0), equal_nan=True)
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no annotation, the first is 'dog/1.jpg'"):
        found.select(["cat/1.jpg", "dog/1.jpg"])


TRANSFORMS = {
    "center": {},
    "center, whole": {"crop_pct": 1.0},
    "squash": {"crop_mode": "squash", "crop_pct": 0.9},
    "border": {"crop_mode": "border", "crop_pct": 1.0},
    "border, cropped": {"crop_mode": "border", "crop_pct": 0.8},
    "trimmed": {"crop_border_pixels": 7},
}


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("size", [(200, 120), (90, 171), (64, 64), (33, 50)])
@pytest.mark.parametrize("input_size", [(3, 64, 64), (3, 48, 80)])
def test_a_marked_pixel_arrives_where_the_geometry_says(options, size, input_size):
    transform = create_transform(input_size, is_training=False, mean=(0, 0, 0), std=(1, 1, 1), **options)
    width, height = size
    geometry = input_geometry(transform, width, height)
    for share_x, share_y in ((0.47, 0.5), (0.56, 0.44)):  # inside what every crop keeps
        left, top = int(share_x * width), int(share_y * height)
        picture = Image.new("RGB", size)
        picture.paste((255, 255, 255), (left, top, left + 4, top + 4))
        light = transform(picture).mean(dim=0)
        assert light.shape == (geometry.size[1], geometry.size[0]) == input_size[1:]
        rows, columns = torch.arange(light.shape[0]) + 0.5, torch.arange(light.shape[1]) + 0.5
        found_x = float((light.sum(0) * columns).sum() / light.sum())
        found_y = float((light.sum(1) * rows).sum() / light.sum())
        assert found_x == pytest.approx((left + 2) * geometry.scale[0] + geometry.offset[0], abs=0.3)
        assert found_y == pytest.approx((top + 2) * geometry.scale[1] + geometry.offset[1], abs=0.3)


def test_geometry_by_hand():
    transform = transforms.Compose([transforms.Resize(100), transforms.CenterCrop(80), transforms.ToTensor()])
    assert input_geometry(transform, 400, 200) == Geometry((0.5, 0.5), (-60.0, -10.0), (80, 80))


def test_random_steps_are_refused():
    with pytest.raises(ValueError, match=r"RandomResizedCrop.*is_training=False"):
        input_geometry(create_transform(64, is_training=True), 100, 100)


def test_points_outside_the_input_are_absent_and_boxes_are_cut(tmp_path):
    transform = transforms.Compose([transforms.Resize(50), transforms.CenterCrop(50)])
    found = read_annotations(write(tmp_path, WIDE)).to_input(transform)
    # The first picture is halved and loses 25 pixels on the left and on the right.
    assert found.points[0, 0].tolist() == [25, 40]
    assert found.points[0, 1].isnan().all()
    assert found.object_boxes()[0].tolist() == [0, 5, 30, 45]
    assert found.part_boxes()[1][0].isnan().all()
    assert found.sizes.tolist() == [[50, 50], [50, 50]]


def test_unknown_picture_sizes_are_asked_for(tmp_path):
    found = read_annotations(write(tmp_path, "image,part,x,y\na.png,eye,10,20\n"))
    with pytest.raises(ValueError, match="width and height"):
        found.to_input(transforms.Resize((10, 10)))
    moved = found.to_input(transforms.Resize((10, 10)), sizes=torch.tensor([[100.0, 50.0]]))
    assert moved.points.tolist() == [[[1.0, 4.0]]]


@pytest.mark.skipif(not ANIMALS.is_dir(), reason="the animal pictures are not here")
def test_the_animal_annotations_read_alike_from_both_files():
    table, records = read_annotations(ANIMALS / "annotations.csv"), read_annotations(ANIMALS / "annotations.json")
    assert table.point_names == ("head", "legs")
    assert len(table.files) == 2549
    records = records.select(table.files)
    torch.testing.assert_close(records.points, table.points, equal_nan=True)
    torch.testing.assert_close(records.boxes, table.boxes, equal_nan=True)
    assert not table.object_boxes().isnan().any()
    assert math.isnan(float(table.points[table.files.index(next(f for f in table.files if "goldfish" in f)), 1, 0]))


@pytest.fixture
def photograph(tmp_path):
    """A picture of 40 x 20 stored pixels that viewers turn to 20 x 40; its one bright block is at (4, 30) then."""
    upright = Image.new("RGB", (20, 40))
    upright.paste((255, 255, 255), (2, 28, 6, 32))
    exif = upright.getexif()
    exif[0x0112] = 6  # the camera was held upright
    (tmp_path / "cat").mkdir()
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "cat" / "1.png", exif=exif)
    return tmp_path


def subject_of(root, annotations):
    """What read_for looks at: the loader's data set, with a transform that halves the picture."""
    dataset = CheckedImages(create_dataset("folder", root), num_classes=1)
    dataset.transform = transforms.Compose([transforms.Resize((20, 10)), transforms.ToTensor()])
    return SimpleNamespace(loader=SimpleNamespace(dataset=dataset), options={"landmarks": annotations})


@pytest.mark.parametrize("sizes", ["", "20,40"], ids=["from the file", "given"])
def test_landmarks_are_those_of_the_upright_picture(photograph, sizes):
    header, row = (
        ("file,width,height,x_x,x_y", f"cat/1.png,{sizes},4,30") if sizes else ("file,x_x,x_y", "cat/1.png,4,30")
    )
    subject = subject_of(photograph, write(photograph, f"{header}\n{row}\n"))
    found = read_for(subject, "landmarks").points[0, 0]
    assert found.tolist() == [2.0, 15.0]
    seen, _ = subject.loader.dataset[0]
    assert seen[0, 15, 2] > 0.5 > 3 * seen[0].mean()


def test_landmarks_of_the_picture_on_its_side_are_refused(photograph):
    path = write(photograph, "file,width,height,x_x,x_y\ncat/1.png,40,20,30,16\n")
    with pytest.raises(
        ValueError, match=r"cat/1.png is said to have 40 x 20 pixels, but has 20 x 40; .* turned upright"
    ):
        read_for(subject_of(photograph, path), "landmarks")
