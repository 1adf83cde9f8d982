"""Mechanisms: what acts between the last conv stage and the head. One paper, one file."""

from timm_csg.mechanisms.assigned import AssignedConfig, AssignedFilters
from timm_csg.mechanisms.base import Head, Mechanism, MechanismConfig
from timm_csg.mechanisms.chain import Chain, ChainConfig
from timm_csg.mechanisms.csg import ClassSpecificGate, CSGConfig
from timm_csg.mechanisms.icnn import ICNNConfig, InterpretableFilters
from timm_csg.mechanisms.picnn import InterpretationPathway, PICNNConfig
from timm_csg.mechanisms.registry import list_mechanisms, register_mechanism

__all__ = [
    "AssignedConfig",
    "AssignedFilters",
    "CSGConfig",
    "Chain",
    "ChainConfig",
    "ClassSpecificGate",
    "Head",
    "ICNNConfig",
    "InterpretableFilters",
    "InterpretationPathway",
    "Mechanism",
    "MechanismConfig",
    "PICNNConfig",
    "list_mechanisms",
    "register_mechanism",
]
