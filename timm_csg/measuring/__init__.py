"""Measuring: what runs a model over images, for the metrics that are functions of what comes out."""

from timm_csg.measuring.ablating import ablate
from timm_csg.measuring.annotations import Annotations, read_annotations
from timm_csg.measuring.attacks import fgsm, pgd
from timm_csg.measuring.collecting import Activations, ShardSampler, collect, collect_bytes
from timm_csg.measuring.fields import ReceptiveField, effective_diameter, receptive_field
from timm_csg.measuring.geometry import Geometry, input_geometry
from timm_csg.measuring.interpretability import PartInterpretability, part_interpretability
from timm_csg.measuring.localisation import cam_localisation
from timm_csg.measuring.localisation_by_gradients import gradmap
from timm_csg.measuring.localisation_by_maps import activmap
from timm_csg.measuring.measurement import Measurement, measure
from timm_csg.measuring.peaks import collect_peaks
from timm_csg.measuring.stage_weights import StageWeight, stage_weight

__all__ = [
    "Activations",
    "Annotations",
    "Geometry",
    "Measurement",
    "PartInterpretability",
    "ReceptiveField",
    "ShardSampler",
    "StageWeight",
    "ablate",
    "activmap",
    "cam_localisation",
    "collect",
    "collect_bytes",
    "collect_peaks",
    "effective_diameter",
    "fgsm",
    "gradmap",
    "input_geometry",
    "measure",
    "part_interpretability",
    "pgd",
    "read_annotations",
    "receptive_field",
    "stage_weight",
]
