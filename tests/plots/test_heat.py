"""Heat maps over images: colours where the map is large, the image where it is not."""

import pytest
import torch

from timm_csg.plots import overlay
from timm_csg.plots.heat import heat_colours, heat_levels


def pixels(picture):
    return torch.tensor(list(picture.getdata())).view(picture.height, picture.width, 3)


def test_image_shows_unchanged_where_nothing_responds():
    image = torch.rand(3, 6, 8)
    drawn = pixels(overlay(image, torch.zeros(6, 8)))
    assert torch.equal(drawn, (image * 255).round().long().permute(1, 2, 0))


def test_mixture_is_that_of_colour_and_opacity():
    image, heat = torch.full((1, 1, 1), 0.5), torch.tensor([[0.4]])
    red, green, blue, opacity = heat_colours()[round(0.4 * 31)].tolist()
    share = opacity / 255
    expected = [round(127.5 * (1 - share) + colour * share) for colour in (red, green, blue)]
    assert pixels(overlay(image, heat, scale=1.0))[0, 0].tolist() == expected


def test_small_map_is_enlarged_to_the_image():
    assert overlay(torch.rand(3, 20, 30), torch.rand(2, 3)).size == (30, 20)


def test_levels_keep_the_order_of_the_values():
    values = torch.linspace(-1, 1, 50)
    levels = heat_levels(values).long()
    assert bool((levels.diff() >= 0).all())
    assert int(levels[0]) == 0
    assert int(levels[-1]) == 31


@pytest.mark.parametrize(
    ("image", "heat", "message"),
    [((4, 8, 8), (8, 8), "1 or 3 channels"), ((3, 8), (8, 8), "1 or 3"), ((3, 8, 8), (1, 8, 8), "single map")],
)
def test_other_shapes_are_refused(image, heat, message):
    with pytest.raises(ValueError, match=message):
        overlay(torch.rand(image), torch.rand(heat))
