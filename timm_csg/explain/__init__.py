"""Explanations of single images and filters: a model and images in, tensors out; nothing is left behind in the model.

Every function takes plain and differentiated timm models. Where a method does not apply, it says why and what does.
"""

from timm_csg.explain.class_maps import Normalised, cam, coarse_map, grad_cam, guided_grad_cam, normalise, owner_map
from timm_csg.explain.evidence import evidence_map, guided_evidence_map
from timm_csg.explain.factors import factor_activation_map, factor_maps
from timm_csg.explain.filters import (
    ClassFilters,
    StrongestImages,
    class_filters,
    filter_maps,
    patches,
    strongest_images,
)
from timm_csg.explain.gradients import activation_counts, deconvnet, gradient, guided_backprop
from timm_csg.explain.inputs import Images, as_batch
from timm_csg.explain.two_classes import Contrast, contrast
from timm_csg.explain.why import FilterEvidence, PathEvidence, PredictionExplanation, explain_prediction

__all__ = [
    "ClassFilters",
    "Contrast",
    "FilterEvidence",
    "Images",
    "Normalised",
    "PathEvidence",
    "PredictionExplanation",
    "StrongestImages",
    "activation_counts",
    "as_batch",
    "cam",
    "class_filters",
    "coarse_map",
    "contrast",
    "deconvnet",
    "evidence_map",
    "explain_prediction",
    "factor_activation_map",
    "factor_maps",
    "filter_maps",
    "grad_cam",
    "gradient",
    "guided_backprop",
    "guided_evidence_map",
    "guided_grad_cam",
    "normalise",
    "owner_map",
    "patches",
    "strongest_images",
]
