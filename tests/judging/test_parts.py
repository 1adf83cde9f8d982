"""Consistency and stability of parts against loops over pictures and filters."""

import math

import pytest
import torch
from reference import judging as reference

from timm_csg import judging


@pytest.fixture
def case():
    """Places of 6 filters in 20 pictures of 3 classes, landmarks of 4 parts, some absent; filter 5 has no owner."""
    generator = torch.Generator().manual_seed(0)
    points = 100 * torch.rand(20, 4, 2, generator=generator)
    targets, owners = torch.arange(20) % 3, torch.tensor([0, 1, 2, 0, 1, -1])
    places = points[:, [0, 1, 2, 3, 0, 1]] + 6 * torch.randn(20, 6, 2, generator=generator)
    points[::4, 1] = math.nan
    points[targets == 2] = math.nan
    return places, points, targets, owners


def test_hits_equal_a_loop(case):
    places, points, *_ = case
    found = judging.part_hits(places, points, 9)
    expected = reference.hits(places, points, 9)
    assert [[set(one.nonzero()[:, 0].tolist()) for one in row] for row in found] == expected


@pytest.mark.parametrize("half_side", [5, 9, 20])
def test_consistency_and_stability_equal_loops(case, half_side):
    places, points, targets, owners = case
    found = judging.part_consistency(places, points, targets, owners, half_side=half_side)
    expected = torch.tensor(reference.consistency(places, points, targets, owners, half_side, 0.8))
    torch.testing.assert_close(found.values, expected, equal_nan=True)
    noisy = places + 4 * torch.randn(places.shape, generator=torch.Generator().manual_seed(1))
    found = judging.part_stability(places, noisy, points, targets, owners, half_side=half_side)
    expected = torch.tensor(reference.stability(places, noisy, points, targets, owners, half_side))
    torch.testing.assert_close(found.values, expected, equal_nan=True)


def test_the_floor_has_the_landmarks_of_other_pictures(case):
    places, points, targets, owners = case
    found = judging.part_consistency(places, points, targets, owners, half_side=15)
    moved = judging.part_consistency(places, points.roll(10, dims=0), targets, owners, half_side=15)
    assert found.chance == pytest.approx(moved.score)
    assert found.score > found.chance


def test_wrong_shapes_are_said(case):
    places, points, targets, owners = case
    with pytest.raises(ValueError, match=r"places must be \[pictures, filters, 2\]"):
        judging.part_hits(places[0], points, 5)
    with pytest.raises(ValueError, match="an owner for each of 6 filters"):
        judging.part_consistency(places, points, targets, owners[:2], half_side=5)
    with pytest.raises(ValueError, match="must have one shape"):
        judging.part_stability(places, places[:3], points, targets, owners, half_side=5)
