"""Make timm models interpretable by training: ``timm_csg.differentiate(timm.create_model(...), num_classes)``.

Names are imported on first use, so that ``timm-csg --help`` and ``timm_csg.__version__`` need no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from timm_csg.version import __version__

if TYPE_CHECKING:
    from timm_csg import explain as explain
    from timm_csg import judging as judging
    from timm_csg import measuring as measuring
    from timm_csg import metrics as metrics
    from timm_csg import plots as plots
    from timm_csg import recipes as recipes
    from timm_csg.adaptation import Adaptation, adapt
    from timm_csg.assignment import Assignment, assign_filters
    from timm_csg.checkpoint import save_pretrained
    from timm_csg.differentiation import differentiate, undifferentiate
    from timm_csg.export import Exported, export_onnx, export_program
    from timm_csg.freezing import freeze
    from timm_csg.groups import param_groups
    from timm_csg.hub import from_pretrained
    from timm_csg.hub_errors import HubError
    from timm_csg.loading import load_checkpoint
    from timm_csg.manifest import CheckpointError
    from timm_csg.mechanisms import (
        AssignedConfig,
        AssignedFilters,
        ChainConfig,
        ClassSpecificGate,
        CSGConfig,
        ICNNConfig,
        InterpretableFilters,
        InterpretationPathway,
        Mechanism,
        MechanismConfig,
        PICNNConfig,
        list_mechanisms,
        register_mechanism,
    )
    from timm_csg.model import DifferentiatedModel, PathOutputs, is_differentiated, plain
    from timm_csg.pushing import push_to_hub
    from timm_csg.schedule import Alternating, Joint
    from timm_csg.setting_up import Setup, setup
    from timm_csg.stage import Stage, find_stage
    from timm_csg.training import Progress, TrainingMixin

__all__ = [
    "Adaptation",
    "Alternating",
    "AssignedConfig",
    "AssignedFilters",
    "Assignment",
    "CSGConfig",
    "ChainConfig",
    "CheckpointError",
    "ClassSpecificGate",
    "DifferentiatedModel",
    "Exported",
    "HubError",
    "ICNNConfig",
    "InterpretableFilters",
    "InterpretationPathway",
    "Joint",
    "Mechanism",
    "MechanismConfig",
    "PICNNConfig",
    "PathOutputs",
    "Progress",
    "Setup",
    "Stage",
    "TrainingMixin",
    "__version__",
    "adapt",
    "assign_filters",
    "differentiate",
    "export_onnx",
    "export_program",
    "find_stage",
    "freeze",
    "from_pretrained",
    "is_differentiated",
    "list_mechanisms",
    "load_checkpoint",
    "param_groups",
    "plain",
    "push_to_hub",
    "register_mechanism",
    "save_pretrained",
    "setup",
    "undifferentiate",
]
_MODULES = ("explain", "judging", "measuring", "metrics", "plots", "recipes")
# The modules that the names above come from.
_NAMES = {
    "adaptation": ("Adaptation", "adapt"),
    "assignment": ("Assignment", "assign_filters"),
    "checkpoint": ("save_pretrained",),
    "differentiation": ("differentiate", "undifferentiate"),
    "export": ("Exported", "export_onnx", "export_program"),
    "freezing": ("freeze",),
    "groups": ("param_groups",),
    "hub": ("from_pretrained",),
    "hub_errors": ("HubError",),
    "loading": ("load_checkpoint",),
    "manifest": ("CheckpointError",),
    "mechanisms": (
        "AssignedConfig",
        "AssignedFilters",
        "CSGConfig",
        "ChainConfig",
        "ClassSpecificGate",
        "ICNNConfig",
        "InterpretableFilters",
        "InterpretationPathway",
        "Mechanism",
        "MechanismConfig",
        "PICNNConfig",
        "list_mechanisms",
        "register_mechanism",
    ),
    "model": ("DifferentiatedModel", "PathOutputs", "is_differentiated", "plain"),
    "pushing": ("push_to_hub",),
    "schedule": ("Alternating", "Joint"),
    "setting_up": ("Setup", "setup"),
    "stage": ("Stage", "find_stage"),
    "training": ("Progress", "TrainingMixin"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or one of the modules, on first use."""
    if name in _MODULES:
        return importlib.import_module(f"timm_csg.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'timm_csg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"timm_csg.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is public; modules that were imported on the way are not."""
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
