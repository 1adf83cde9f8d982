"""Judges of explanation maps: can a map be believed? A model, pictures and any ``(model, images, targets) -> maps`` in.

Ours (``explain.grad_cam``), captum's, torch-cam's and pytorch-grad-cam's maps are judged alike. Every judge gives the
number, and beside it the number that chance would have. The model, its modes and gradients, and the random state are
left as found.
"""

from timm_csg.judging.baselines import centre_map, edge_map, noise_map
from timm_csg.judging.encoding import embed
from timm_csg.judging.filters import judge_diversity, judge_filters
from timm_csg.judging.grid import Grids, grid_pointing_game, make_grids
from timm_csg.judging.inside import energy_inside, plausibility, pointing_game
from timm_csg.judging.parts import part_consistency, part_hits, part_stability, with_noise
from timm_csg.judging.pixel_games import deletion, insertion, probability_curve
from timm_csg.judging.results import Judged
from timm_csg.judging.sanity import random_logit, weight_randomisation
from timm_csg.judging.together import JUDGES, judge
from timm_csg.judging.under_noise import map_similarity, stability

__all__ = [
    "JUDGES",
    "Grids",
    "Judged",
    "centre_map",
    "deletion",
    "edge_map",
    "embed",
    "energy_inside",
    "grid_pointing_game",
    "insertion",
    "judge",
    "judge_diversity",
    "judge_filters",
    "make_grids",
    "map_similarity",
    "noise_map",
    "part_consistency",
    "part_hits",
    "part_stability",
    "plausibility",
    "pointing_game",
    "probability_curve",
    "random_logit",
    "stability",
    "weight_randomisation",
    "with_noise",
]
