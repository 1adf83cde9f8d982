"""Processes that load images are started where they help."""

import pytest

from timm_csg.cli.preprocessing import FEW_IMAGES, loader_workers


@pytest.mark.parametrize(
    ("asked", "images", "cores", "expected"),
    [
        (None, 84, 16, 0),
        (None, FEW_IMAGES - 1, 16, 0),
        (None, FEW_IMAGES, 16, 2),
        (None, 50_000, 2, 0),
        (None, None, 16, 2),  # a stream
        (0, 50_000, 16, 0),
        (3, 84, 1, 3),
    ],
)
def test_few_images_and_few_cores_have_none(asked, images, cores, expected):
    assert loader_workers(asked, images, cores) == expected


def test_cores_are_those_of_this_process():
    assert loader_workers(None, 50_000) in (0, 2)
