"""Metrics: pure functions of tensors, and the one pass over the data that makes them."""

from timm_csg.metrics.ablation import Ablation, ablate, ablate_linear, top_filters
from timm_csg.metrics.adversarial import (
    Detection,
    default_classifiers,
    detection_errors,
    path_disagreement,
    threshold_detection,
)
from timm_csg.metrics.attacks import fgsm, pgd
from timm_csg.metrics.class_specificity import class_correlation, class_selectivity, purity
from timm_csg.metrics.collect import Activations, ShardSampler, accuracy, collect, collect_bytes, pool
from timm_csg.metrics.fields import ReceptiveField, effective_diameter, receptive_field
from timm_csg.metrics.filter_quality import class_independence, contrastiveness, mono_score, spatial_diversity
from timm_csg.metrics.gate import (
    GateCounts,
    binarity,
    classes_per_filter,
    filters_per_class,
    gate_counts,
    gate_density,
    owned_filters,
    owner_agreement,
    owners,
)
from timm_csg.metrics.geometry import Geometry, input_geometry
from timm_csg.metrics.instability import (
    LocationInstability,
    Peaks,
    collect_peaks,
    location_instability,
    peak_places,
)
from timm_csg.metrics.interpretability import PartInterpretability, part_interpretability
from timm_csg.metrics.interval import Interval, half_sample_interval, mutual_information_score_interval
from timm_csg.metrics.landmarks import Annotations, read_annotations
from timm_csg.metrics.linear_probe import Relearning, relearning
from timm_csg.metrics.localisation import Localisation, cam, whole_image
from timm_csg.metrics.localisation_by_gradients import gradmap
from timm_csg.metrics.localisation_by_maps import activmap
from timm_csg.metrics.mutual_information import (
    ClassInformation,
    FilterInformation,
    mutual_information,
    mutual_information_bound,
    mutual_information_per_class,
    mutual_information_per_filter,
    mutual_information_score,
)
from timm_csg.metrics.similarity import (
    SimilaritySummary,
    StageWeight,
    activation_similarity,
    stage_weight,
    summarize_similarity,
    weight_similarity,
)
from timm_csg.metrics.verdict import Verdict, verdict

__all__ = [
    "Ablation",
    "Activations",
    "Annotations",
    "ClassInformation",
    "Detection",
    "FilterInformation",
    "GateCounts",
    "Geometry",
    "Interval",
    "Localisation",
    "LocationInstability",
    "PartInterpretability",
    "Peaks",
    "ReceptiveField",
    "Relearning",
    "ShardSampler",
    "SimilaritySummary",
    "StageWeight",
    "Verdict",
    "ablate",
    "ablate_linear",
    "accuracy",
    "activation_similarity",
    "activmap",
    "binarity",
    "cam",
    "class_correlation",
    "class_independence",
    "class_selectivity",
    "classes_per_filter",
    "collect",
    "collect_bytes",
    "collect_peaks",
    "contrastiveness",
    "default_classifiers",
    "detection_errors",
    "effective_diameter",
    "fgsm",
    "filters_per_class",
    "gate_counts",
    "gate_density",
    "gradmap",
    "half_sample_interval",
    "input_geometry",
    "location_instability",
    "mono_score",
    "mutual_information",
    "mutual_information_bound",
    "mutual_information_per_class",
    "mutual_information_per_filter",
    "mutual_information_score",
    "mutual_information_score_interval",
    "owned_filters",
    "owner_agreement",
    "owners",
    "part_interpretability",
    "path_disagreement",
    "peak_places",
    "pgd",
    "pool",
    "purity",
    "read_annotations",
    "receptive_field",
    "relearning",
    "spatial_diversity",
    "stage_weight",
    "summarize_similarity",
    "threshold_detection",
    "top_filters",
    "verdict",
    "weight_similarity",
    "whole_image",
]
