"""Make timm models interpretable by training: ``timm_csg.differentiate(timm.create_model(...), num_classes)``."""

import importlib
from types import ModuleType

from timm_csg.checkpoint import load_checkpoint, save_pretrained
from timm_csg.hub import from_pretrained, push_to_hub
from timm_csg.hub_errors import HubError
from timm_csg.manifest import CheckpointError
from timm_csg.mechanisms import (
    ChainConfig,
    ClassSpecificGate,
    CSGConfig,
    ICNNConfig,
    InterpretableFilters,
    Mechanism,
    MechanismConfig,
    list_mechanisms,
    register_mechanism,
)
from timm_csg.model import (
    DifferentiatedModel,
    PathOutputs,
    differentiate,
    is_differentiated,
    plain,
    undifferentiate,
)
from timm_csg.schedule import Alternating, Joint
from timm_csg.stage import Stage, find_stage
from timm_csg.training import Progress, TrainingMixin, param_groups
from timm_csg.version import __version__

__all__ = [
    "Alternating",
    "CSGConfig",
    "ChainConfig",
    "CheckpointError",
    "ClassSpecificGate",
    "DifferentiatedModel",
    "HubError",
    "ICNNConfig",
    "InterpretableFilters",
    "Joint",
    "Mechanism",
    "MechanismConfig",
    "PathOutputs",
    "Progress",
    "Stage",
    "TrainingMixin",
    "__version__",
    "differentiate",
    "find_stage",
    "from_pretrained",
    "is_differentiated",
    "list_mechanisms",
    "load_checkpoint",
    "param_groups",
    "plain",
    "push_to_hub",
    "register_mechanism",
    "save_pretrained",
    "undifferentiate",
]


def __getattr__(name: str) -> ModuleType:
    """Import ``timm_csg.explain``, ``metrics``, ``plots`` and ``recipes`` on first use."""
    if name in ("explain", "metrics", "plots", "recipes"):
        return importlib.import_module(f"timm_csg.{name}")
    raise AttributeError(f"module 'timm_csg' has no attribute {name!r}")
