"""Mechanisms: what acts between the last conv stage and the head. One paper, one file."""

from timm_csg.mechanisms.base import (
    Head,
    Mechanism,
    MechanismConfig,
    list_mechanisms,
    register_mechanism,
)
from timm_csg.mechanisms.csg import ClassSpecificGate, CSGConfig

__all__ = [
    "CSGConfig",
    "ClassSpecificGate",
    "Head",
    "Mechanism",
    "MechanismConfig",
    "list_mechanisms",
    "register_mechanism",
]
