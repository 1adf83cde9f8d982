"""The grid pointing game against a loop, by hand, and where there is no grid to build."""

import pytest
import torch
from reference import judging as reference

from timm_csg import judging


@pytest.mark.parametrize("side", [2, 3])
def test_share_in_the_own_cell_equals_a_loop(side, colours, pictures):
    made = []

    def explain(model, images, targets):
        maps = torch.randn(len(images), *images.shape[2:], generator=torch.Generator().manual_seed(len(made)))
        maps[0] = -1  # nothing positive
        made.append(maps)
        return maps

    found = judging.grid_pointing_game(explain, colours, *pictures, side=side, batch_size=side**4)
    expected = reference.grid_share(torch.cat(made), side)
    torch.testing.assert_close(found.values, torch.tensor(expected))
    assert found.chance == 1 / side**2
    assert found.values[0] == 0


def test_each_cell_holds_the_picture_that_its_class_is_explained_on(colours, pictures, own_colour):
    shown = []

    def explain(model, images, targets):
        shown.append((images, targets))
        return own_colour(model, images, targets)

    found = judging.grid_pointing_game(explain, colours, *pictures)
    assert found.score > 0.75
    for images, targets in shown:
        assert images.shape[2:] == (12, 12)
        for place, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
            row, column = divmod(place % 4, 2)
            cell = image[:, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
            assert int(cell.mean(dim=(1, 2)).argmax()) == target
            assert any(torch.equal(cell, picture) for picture in pictures[0])


def test_grids_hold_confident_right_pictures_of_different_classes_once():
    generator = torch.Generator().manual_seed(0)
    chances, targets = torch.rand(300, 6, generator=generator).mul(5).softmax(dim=1), torch.arange(300) % 6
    allowed = reference.grids(chances, targets, 2, 0.3)
    found = judging.make_grids(chances, targets, confidence=0.3)
    assert len(found.rows) > 2
    assert found.rows.unique().numel() == found.rows.numel()
    assert torch.equal(targets[found.rows], found.targets)
    for labels in found.targets.tolist():
        assert len(set(labels)) == 4
    for target, rows in allowed.items():
        used = found.rows[found.targets == target].tolist()
        assert used == rows[: len(used)]  # the most confident first
    assert not torch.equal(judging.make_grids(chances, targets, confidence=0.3, seed=1).rows, found.rows)
    assert len(judging.make_grids(chances, targets, confidence=0.3, grids=2).rows) == 2


def test_too_few_classes_are_said_in_one_sentence(colours, pictures, own_colour):
    images, targets = pictures
    with pytest.raises(ValueError, match=r"needs 4 classes .* at least 0.5, but only 3 of 3 have one"):
        judging.grid_pointing_game(own_colour, colours, images[:3], targets[:3])
    with pytest.raises(ValueError, match="only 0 of 9 have one"):
        judging.grid_pointing_game(own_colour, colours, -images, targets)
    with pytest.raises(ValueError, match="9 classes"):
        judging.grid_pointing_game(own_colour, colours, images[:8], targets[:8], side=3)


@pytest.mark.parametrize("side", [2, 3])
def test_grids_made_before_spare_the_model_the_choice(side, colours, pictures, own_colour):
    images, targets = pictures
    expected = judging.grid_pointing_game(own_colour, colours, images, targets, side=side, seed=2)
    made = judging.make_grids(colours(images).softmax(dim=1), targets, side=side, seed=2)
    seen = []
    colours.register_forward_hook(lambda *_: seen.append(1))
    found = judging.grid_pointing_game(own_colour, colours, images, targets, side=side, grids=made)
    assert torch.equal(found.values, expected.values)
    assert not seen
    single = judging.Grids(made.rows[1:2], made.targets[1:2])
    found = judging.grid_pointing_game(own_colour, colours, images, targets, side=side, grids=single)
    assert torch.equal(found.values, expected.values[side**2 : 2 * side**2])


def test_grids_of_another_shape_or_other_pictures_are_refused(colours, pictures, own_colour):
    images, targets = pictures
    made = judging.make_grids(colours(images).softmax(dim=1), targets, side=3)
    with pytest.raises(ValueError, match=r"grids of 2 x 2 .* \[grids, 4\].*side=2"):
        judging.grid_pointing_game(own_colour, colours, images, targets, grids=made)
    with pytest.raises(ValueError, match="there are 2 pictures"):
        judging.grid_pointing_game(own_colour, colours, images[:2], targets[:2], side=3, grids=made)


def test_shrunken_grids_have_the_size_of_a_picture(colours, pictures, own_colour):
    found = judging.grid_pointing_game(own_colour, colours, *pictures, side=3, shrink=True)
    assert found.score > 0.5


def test_smoothing_lets_alternating_signs_cancel(colours, pictures):
    def checkerboard(model, images, targets):
        sign = (torch.arange(images.shape[2])[:, None] + torch.arange(images.shape[3])) % 2
        maps = (sign * 2.0 - 1).repeat(len(images), 1, 1)
        maps[:, 1, 1] += 100
        return maps

    rough = judging.grid_pointing_game(checkerboard, colours, *pictures, grids=1)
    smooth = judging.grid_pointing_game(checkerboard, colours, *pictures, grids=1, smooth=3)
    assert smooth.values[0] > rough.values[0]
    with pytest.raises(ValueError, match="odd"):
        judging.grid_pointing_game(checkerboard, colours, *pictures, smooth=2)
