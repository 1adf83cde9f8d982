"""Figures: drawn without pyplot, in the order of owners, with names that fit."""

import io
import sys

import pytest
import torch
from PIL import Image
from processes import run_in_processes

from timm_csg.plots import class_filter_figure, map_figure
from timm_csg.plots.matrix import filter_order


def draw(rank):
    class_filter_figure(torch.rand(3, 8), ["a", "b", "c"], title="t").savefig("/dev/null")
    assert "matplotlib.pyplot" not in sys.modules


def test_figure_is_written_and_pyplot_is_left_alone():
    run_in_processes(draw)


def test_rows_are_classes_and_columns_follow_the_order():
    matrix = torch.tensor([[0.0, 1.0, 0.2], [0.5, 0.0, 1.0]])
    figure = class_filter_figure(matrix)
    drawn = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    assert torch.equal(drawn, matrix[:, [1, 2, 0]])


def test_notebook_shows_a_figure_that_is_the_value_of_a_cell():
    pictures = torch.rand(1, 3, 8, 8)
    for figure in (class_filter_figure(torch.rand(3, 8)), map_figure({"picture": pictures})):
        shown = Image.open(io.BytesIO(figure._repr_png_()))
        assert shown.format == "PNG"
        assert len(set(shown.convert("L").getdata())) > 2


def test_png_has_content():
    buffer = io.BytesIO()
    class_filter_figure(torch.eye(10).repeat(1, 6)).savefig(buffer, format="png")
    assert len(set(Image.open(buffer).convert("L").getdata())) > 2


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 rows but 2 class names"):
        class_filter_figure(torch.rand(3, 8), ["a", "b"])


def test_filters_are_sorted_by_owner_then_strength():
    matrix = torch.tensor([[0.2, 0.9, 0.0, 0.1], [0.1, 0.0, 0.3, 0.8]])
    assert filter_order(matrix).tolist() == [1, 0, 3, 2]
