"""Sheets of pictures and maps: what is drawn where, and what is refused."""

import pytest
import torch

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from timm_csg.plots import map_figure


def test_each_image_is_a_row_and_each_column_has_its_name():
    pictures = torch.rand(2, 3, 8, 8)
    figure = map_figure({"picture": pictures, "map": (pictures, torch.rand(2, 8, 8)), "gray": pictures[:, :1]})
    axes = figure.axes
    assert len(axes) == 6
    assert [axis.get_title() for axis in axes[:3]] == ["picture", "map", "gray"]
    assert [len(axis.images) for axis in axes] == [1, 2, 1] * 2


def test_maps_are_scaled_by_their_own_peak_and_empty_ones_are_marked():
    pictures = torch.rand(2, 3, 4, 4)
    maps = torch.stack([torch.full((4, 4), 0.25), torch.zeros(4, 4)])
    first, second = map_figure({"map": (pictures, maps)}).axes
    assert first.images[1].get_array().max() == 1
    assert len(second.images) == 1
    assert second.texts[0].get_text() == "empty"


def test_columns_that_do_not_fit_are_refused():
    pictures = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="same number of images, but have \\[1, 2\\]"):
        map_figure({"a": pictures, "b": pictures[:1]})
    with pytest.raises(ValueError, match=r"must be \[2, 8, 8\], but are \[2, 4, 4\]; create them with upsample=True"):
        map_figure({"a": (pictures, torch.rand(2, 4, 4))})
    with pytest.raises(ValueError, match="1 or 3"):
        map_figure({"a": torch.rand(2, 4, 8, 8)})
    with pytest.raises(ValueError, match="same number of images"):
        map_figure({})
