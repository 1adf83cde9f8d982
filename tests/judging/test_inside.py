"""Maps against boxes: loops, hand-computed values, and boxes that cannot be right."""

import math

import pytest
import torch
from reference import judging as reference

from timm_csg import judging


@pytest.fixture
def maps():
    return torch.randn(12, 9, 11, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def boxes():
    corner = 4 * torch.rand(12, 2, generator=torch.Generator().manual_seed(1))
    return torch.cat([corner, corner + 1 + 4 * torch.rand(12, 2, generator=torch.Generator().manual_seed(2))], dim=1)


def test_judges_of_objects_equal_loops(maps, boxes):
    maps[3] = -1
    pairs = list(zip(maps, boxes.tolist(), strict=True))
    for tolerance in (0, 2):
        found = judging.pointing_game(maps + torch.rand(12, 9, 11) * 1e-6, boxes, tolerance=tolerance)
        assert found.values.tolist()[4:] == [reference.pointing(one, box, tolerance) for one, box in pairs[4:]]
    expected = torch.tensor([reference.energy(one, box) for one, box in pairs])
    torch.testing.assert_close(judging.energy_inside(maps, boxes).values, expected)
    expected = torch.tensor([reference.plausibility(one, box) for one, box in pairs])
    torch.testing.assert_close(judging.plausibility(maps, boxes).values, expected)


def test_a_flat_map_scores_what_chance_does(boxes):
    flat = torch.ones(12, 9, 11)
    for judge in (judging.pointing_game, judging.energy_inside):
        found = judge(flat, boxes)
        assert found.score == pytest.approx(found.chance)
    assert judging.plausibility(flat, boxes)[:2] == (1, 1)


def test_masks_and_boxes_of_the_same_pixels_give_the_same(maps):
    box = torch.tensor([[2.0, 1.0, 6.0, 5.0]] * 12)
    mask = torch.zeros(12, 9, 11, dtype=torch.bool)
    mask[:, 1:5, 2:6] = True
    for judge in (judging.pointing_game, judging.energy_inside, judging.plausibility):
        assert judge(maps, box).values.tolist() == judge(maps, mask).values.tolist()


def test_pictures_without_an_object_are_left_out(maps, boxes):
    boxes[5] = math.nan
    for judge in (judging.pointing_game, judging.energy_inside, judging.plausibility):
        found = judge(maps, boxes)
        assert found.values.isnan().nonzero().tolist() == [[5]]
        assert found.score == pytest.approx(float(judge(maps, boxes).values[[*range(5), *range(6, 12)]].mean()))
    with pytest.raises(ValueError, match="no object in any"):
        judging.energy_inside(maps, torch.full((12, 4), math.nan))


@pytest.mark.parametrize(
    "box", [[-2.0, 0.0, 3.0, 3.0], [0.0, 0.0, 12.0, 3.0], [0.0, 0.0, 3.0, 90.0], [4.0, 2.0, 3.0, 5.0]]
)
def test_boxes_outside_the_picture_are_named(maps, boxes, box):
    boxes[7] = torch.tensor(box)
    with pytest.raises(ValueError, match=r"inside the picture of 11 x 9 pixels, but 1 are not, the first is number 7"):
        judging.energy_inside(maps, boxes)


def test_wrong_shapes_are_said(maps, boxes):
    with pytest.raises(ValueError, match="one object for every map"):
        judging.energy_inside(maps, boxes[:3])
    with pytest.raises(ValueError, match="must be boxes"):
        judging.energy_inside(maps, torch.ones(12, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"maps must be finite and \[pictures, height, width\]"):
        judging.energy_inside(maps[0], boxes)
    with pytest.raises(ValueError, match="whole number of pixels"):
        judging.plausibility(maps, boxes, dilate=-1)
