"""Metrics: pure functions of tensors. What runs a model to get these tensors is in ``timm_csg.measuring``."""

from timm_csg.metrics.ablation import Ablation, ablate_linear, top_filters
from timm_csg.metrics.adversarial import (
    Detection,
    default_classifiers,
    detection_errors,
    path_disagreement,
    threshold_detection,
)
from timm_csg.metrics.class_specificity import class_correlation, class_selectivity, owner_purity, purity
from timm_csg.metrics.filter_quality import class_independence, contrastiveness, mono_score, spatial_diversity
from timm_csg.metrics.frames import to_dataframe
from timm_csg.metrics.gate import (
    GateCounts,
    binarity,
    chance_agreement,
    classes_per_filter,
    filters_per_class,
    gate_counts,
    gate_density,
    owned_filters,
    owner_agreement,
    owners,
)
from timm_csg.metrics.information import (
    ClassInformation,
    FilterInformation,
    mutual_information,
    mutual_information_bound,
    mutual_information_per_class,
    mutual_information_per_filter,
    mutual_information_score,
)
from timm_csg.metrics.instability import LocationInstability, Peaks, location_instability, peak_places
from timm_csg.metrics.interval import Interval, half_sample_interval, mutual_information_score_interval
from timm_csg.metrics.linear_probe import Relearning, relearning
from timm_csg.metrics.localisation import Localisation, whole_image
from timm_csg.metrics.noise import NoiseFloor, noise_floor
from timm_csg.metrics.pooling import pool
from timm_csg.metrics.predictions import accuracy, accuracy_per_class
from timm_csg.metrics.proportions import ClassRates, Proportion, accuracy_interval, class_rates, wilson_interval
from timm_csg.metrics.similarity import (
    SimilaritySummary,
    activation_similarity,
    summarize_similarity,
    weight_similarity,
)
from timm_csg.metrics.verdicts import Verdict, verdict

__all__ = [
    "Ablation",
    "ClassInformation",
    "ClassRates",
    "Detection",
    "FilterInformation",
    "GateCounts",
    "Interval",
    "Localisation",
    "LocationInstability",
    "NoiseFloor",
    "Peaks",
    "Proportion",
    "Relearning",
    "SimilaritySummary",
    "Verdict",
    "ablate_linear",
    "accuracy",
    "accuracy_interval",
    "accuracy_per_class",
    "activation_similarity",
    "binarity",
    "chance_agreement",
    "class_correlation",
    "class_independence",
    "class_rates",
    "class_selectivity",
    "classes_per_filter",
    "contrastiveness",
    "default_classifiers",
    "detection_errors",
    "filters_per_class",
    "gate_counts",
    "gate_density",
    "half_sample_interval",
    "location_instability",
    "mono_score",
    "mutual_information",
    "mutual_information_bound",
    "mutual_information_per_class",
    "mutual_information_per_filter",
    "mutual_information_score",
    "mutual_information_score_interval",
    "noise_floor",
    "owned_filters",
    "owner_agreement",
    "owner_purity",
    "owners",
    "path_disagreement",
    "peak_places",
    "pool",
    "purity",
    "relearning",
    "spatial_diversity",
    "summarize_similarity",
    "threshold_detection",
    "to_dataframe",
    "top_filters",
    "verdict",
    "weight_similarity",
    "whole_image",
    "wilson_interval",
]
