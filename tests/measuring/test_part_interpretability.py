"""part_interpretability: thresholds, regions and shares against literal loops, and by hand."""

import math

import pytest
import torch
from reference import localisation, parts

from timm_csg import measuring
from timm_csg.measuring.interpretability import discs, part_overlaps, value_exceeded


@pytest.fixture
def pictures():
    """Six images of three classes with boxes of two parts, some of which are absent."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(6, 3, 64, 64, generator=generator)
    corners = 30 * torch.rand(6, 2, 2, generator=generator)
    boxes = torch.cat([corners, corners + 12 + 20 * torch.rand(6, 2, 2, generator=generator)], dim=2)
    boxes[1, 0] = math.nan
    boxes[[2, 5], 1] = math.nan  # no image of the last class has the second part
    return images, torch.tensor([0, 1, 2, 0, 1, 2]), boxes


def loader(images, targets):
    return [(images[:4], targets[:4]), (images[4:], targets[4:])]


def test_shares_are_those_of_the_literal_loops(tiny_model, pictures):
    images, targets, boxes = pictures

    class Narrow(type(tiny_model)):
        """The first three filters only: the loops are slow."""

        def forward_features(self, x):
            return super().forward_features(x)[:, :3]

    tiny_model.__class__ = Narrow
    found = measuring.part_interpretability(tiny_model, loader(images, targets), boxes, share=0.1, diameter=20.0)
    field = measuring.receptive_field(tiny_model, 64)
    masks = [[localisation.box_mask(box.tolist(), 64, 64).tolist() for box in row] for row in boxes]
    expected, thresholds = parts.part_shares(
        tiny_model.forward_features(images).detach(),
        targets,
        masks,
        (field.centre_y.tolist(), field.centre_x.tolist()),
        20.0,
        0.1,
        0.2,
        3,
    )
    torch.testing.assert_close(found.thresholds, torch.tensor(thresholds))
    torch.testing.assert_close(found.shares, torch.tensor(expected), equal_nan=True)
    assert found.diameter == 20.0
    assert 0 < float(found.shares.nanmean()) < 1
    assert found.shares[2, :, 1].isnan().all()


def test_threshold_is_exceeded_by_the_given_number_of_positions():
    maps = torch.randn(10, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for count in (0, 1, 17, 299):
        threshold = value_exceeded(maps.split(3), count)
        assert (maps > threshold[:, None, None]).sum(dim=(0, 2, 3)).tolist() == [count] * 4


def test_overlap_by_hand():
    # Two valid positions cover pixels 0, 1, 2; the part is pixels 2, 3: one of four.
    covered = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    part = torch.tensor([[False, False, True, True]])
    assert part_overlaps(valid, covered, part).tolist() == [[0.25], [0.0]]


def test_discs_lie_around_the_centres():
    field = measuring.ReceptiveField(torch.tensor([2.5]), torch.tensor([2.5, 20.0]), (9.0, 9.0), True)
    disc, outside = discs(field, 3.0, (5, 5)).view(2, 5, 5)
    assert disc.int().tolist() == [[0] * 5, [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0] * 5]
    assert not outside.any()


def test_forms_by_hand():
    shares = torch.tensor([[[0.2, 0.6], [0.4, math.nan]], [[0.1, 0.0], [math.nan, math.nan]]])
    found = measuring.PartInterpretability(shares, torch.zeros(2), 1.0)
    torch.testing.assert_close(found.per_class, torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(found.by_owner(torch.tensor([1, 0])), torch.tensor([0.1, 0.4]))


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_masks_and_boxes_give_the_same_in_every_layout(make_model, pictures, name):
    images, targets, boxes = pictures
    model = make_model(name)
    masks = torch.stack([torch.stack([localisation.box_mask(box.tolist(), 64, 64) for box in row]) for row in boxes])
    first = measuring.part_interpretability(model, loader(images, targets), boxes, share=0.1, diameter=30.0)
    second = measuring.part_interpretability(model, loader(images, targets), masks.bool(), share=0.1, diameter=30.0)
    torch.testing.assert_close(first.shares, second.shares, equal_nan=True)
    assert first.shares.shape == (3, model.num_features, 2)


def test_effective_diameter_of_one_convolution_by_hand():
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 2, 5, bias=False)
            torch.nn.init.ones_(self.layer.weight)

        def forward_features(self, images):
            return self.layer(images)

    # Offsets -2 .. 2 along both axes: mean square 2 along each, so r = 2 and the diameter 2 sqrt(2) 2.
    assert measuring.effective_diameter(Mean(), torch.rand(2, 3, 16, 16)) == pytest.approx(4 * math.sqrt(2))


def test_model_is_left_as_found(tiny_model, pictures):
    images, targets, boxes = pictures
    tiny_model.train()
    before, counts = {name: value.clone() for name, value in tiny_model.state_dict().items()}, []
    measuring.part_interpretability(tiny_model, loader(images, targets), boxes, progress=counts.append)
    assert counts == [4, 2]
    assert tiny_model.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_parts_that_do_not_match_the_images_are_refused(tiny_model, pictures):
    images, targets, boxes = pictures
    with pytest.raises(ValueError, match="3 rows"):
        measuring.part_interpretability(tiny_model, loader(images, targets), boxes[:3])
    with pytest.raises(ValueError, match="12 rows"):
        measuring.part_interpretability(tiny_model, loader(images, targets), torch.cat([boxes, boxes]))
    with pytest.raises(ValueError, match=r"\[images, parts, 4\]"):
        measuring.part_interpretability(tiny_model, loader(images, targets), boxes[:, 0])
