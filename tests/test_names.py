"""Misspelt names of mechanisms, options and choices come with the nearest right one."""

import re

import pytest

import timm_csg
from timm_csg import Alternating, explain


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"mechanism": "icn"}, "Did you mean 'icnn'?"),
        ({"mechanism": "asigned"}, "Did you mean 'assigned'?"),
        ({"solo_weigth": 0.1}, "Did you mean 'solo_weight'?"),
        ({"mechanism": "chian"}, "Did you mean 'chain'?"),
        ({"mechanism": "csg", "sparsty_weight": 0.1}, "Did you mean 'sparsity_weight'?"),
        ({"mechanism": "csg", "sparsity_norm": "smoothl1"}, "Did you mean 'smooth_l1'?"),
        ({"mechanism": "icnn", "variant": "papr"}, "Did you mean 'paper'?"),
        ({"mechanism": "icnn", "extra_conv": "depth-wise"}, "Did you mean 'depthwise'?"),
    ],
)
def test_differentiate_offers_the_nearest_name(tiny_model, options, found):
    with pytest.raises(ValueError, match=re.escape(found)):
        timm_csg.differentiate(tiny_model, **options)


def test_schedules_and_explanations_do_so_too(tiny_model, images):
    with pytest.raises(ValueError, match="Did you mean 'epoch'"):
        Alternating(unit="epochs")
    with pytest.raises(ValueError, match="Did you mean 'gated'"):
        explain.grad_cam(timm_csg.differentiate(tiny_model), images, path="gate")


def test_names_that_are_near_none_get_no_guess(tiny_model):
    with pytest.raises(ValueError, match=r"known are .*\.$"):
        timm_csg.differentiate(tiny_model, mechanism="dropout")
