"""Deletion and insertion against literal loops, and by hand."""

import pytest
import torch
from reference import judging as reference

from timm_csg import judging


@pytest.mark.parametrize("game", ["deletion", "insertion"])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_curves_equal_a_loop(game, steps, tiny_model, images, targets):
    maps = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))
    images, maps = images[:, :, :24, :24], maps[:, :24, :24]
    found = judging.probability_curve(tiny_model, images, targets, maps, game=game, steps=steps, batch_size=2)
    for row in range(3):
        expected = reference.curve(tiny_model, images[row], int(targets[row]), maps[row], game, steps)
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    one = getattr(judging, game)(None, tiny_model, images, targets, maps=maps, steps=steps)
    torch.testing.assert_close(one.values, torch.tensor([reference.area(curve) for curve in found.tolist()]))


def test_chance_is_the_score_of_the_maps_of_other_pictures(tiny_model, images, targets):
    maps = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))
    found = judging.deletion(None, tiny_model, images, targets, maps=maps, steps=4)
    other = judging.deletion(None, tiny_model, images, targets, maps=maps[[2, 0, 1]], steps=4)
    assert found.chance == pytest.approx(other.score)
    assert torch.isnan(torch.tensor(judging.deletion(None, tiny_model, images[:1], targets[:1], maps=maps[:1]).chance))


def test_a_map_of_what_the_model_sees_deletes_faster_and_inserts_faster_than_its_opposite(colours, own_colour):
    images = torch.zeros(4, 9, 16, 16)
    images[:, 0, 2:5, 2:5] = 10
    images[:, 1, 10:13, 10:13] = 10
    targets = torch.zeros(4, dtype=torch.long)
    good, bad = own_colour, lambda model, images, targets: -own_colour(model, images, targets)
    assert (
        judging.deletion(good, colours, images, targets).score < judging.deletion(bad, colours, images, targets).score
    )
    assert (
        judging.insertion(good, colours, images, targets).score > judging.insertion(bad, colours, images, targets).score
    )


def test_equal_values_change_in_random_order_that_the_seed_decides(colours, pictures):
    images, targets = pictures
    flat = torch.zeros(len(images), 6, 6)
    first, again, other = (
        judging.probability_curve(colours, images, targets, flat, steps=3, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [3, 16])
def test_blurred_pictures_keep_their_mean_colour_also_when_smaller_than_the_blur(size):
    from timm_csg.judging.pixel_games import blurred

    flat = torch.full((1, 3, size, size), 0.7)
    torch.testing.assert_close(blurred(flat), flat)
