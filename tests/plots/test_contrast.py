"""The figure of a contrast: bars are the numbers, and a filter has one colour."""

import pytest
import torch

from timm_csg.explain import contrast
from timm_csg.plots import contrast_figure, filter_colour


def test_bars_are_the_contributions_and_sum_to_the_difference(make_model, images):
    model = make_model()
    found = contrast(model, images, 0, 3, top=4)
    figure = contrast_figure(images, found, names=["cat", "dog", "owl", "$fox$", "ox"])
    for row, axes in enumerate(figure.axes[1::2]):
        widths = [bar.get_width() for bar in axes.patches]
        assert widths[:4] == pytest.approx(found.contribution[row, found.filters[row]].tolist())
        assert sum(widths) == pytest.approx(float(found.difference[row]), abs=1e-5)
        assert axes.get_title() == f"cat rather than $fox$: {float(found.difference[row]):+.2f}"
    figure.savefig("/dev/null", format="png")


def test_a_filter_has_one_colour_in_bars_and_picture(make_model, images):
    from matplotlib.colors import to_hex

    found = contrast(make_model(), images, 0, 3, top=2)
    figure = contrast_figure(images, found)
    for row in range(3):
        bars = [to_hex(bar.get_facecolor()) for bar in figure.axes[2 * row + 1].patches[:2]]
        painted = [to_hex(image.get_array()[0, 0, :3]) for image in figure.axes[2 * row].images[1:]]
        assert bars == painted == [filter_colour(index) for index in found.filters[row].tolist()]


def test_colours_of_the_first_filters_differ():
    assert len({filter_colour(index) for index in range(500)}) == 500


def test_wrong_sizes_are_refused(make_model, images):
    found = contrast(make_model(), images, 0, 3, upsample=False)
    with pytest.raises(ValueError, match="upsample=True"):
        contrast_figure(images, found)
    with pytest.raises(ValueError, match="is of 3 images, but there are"):
        contrast_figure(images[:2], found)
    assert contrast_figure(images, found._replace(maps=None)).axes


def test_model_with_tokens_only_has_bars_without_maps(make_model, images):
    found = contrast(make_model("test_vit", global_pool="token"), images, 0, 1)
    assert all(len(axes.images) == 1 for axes in contrast_figure(images, found).axes[::2])
    assert torch.is_tensor(found.contribution)
