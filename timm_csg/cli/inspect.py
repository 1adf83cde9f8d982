"""``timm-csg inspect``: what this package finds in a model, without images."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_csg import explain, metrics
from timm_csg.cli.checkpoints import checkpoint_folder, open_checkpoint
from timm_csg.differentiation import differentiate, undifferentiate
from timm_csg.head import find_classifier, probe_head
from timm_csg.labels import class_names
from timm_csg.manifest import Manifest
from timm_csg.mechanisms import list_mechanisms
from timm_csg.model import DifferentiatedModel, is_differentiated
from timm_csg.stage import Stage, find_stage

_RECTIFIERS = ("ReLU", "ReLU6", "Threshold", "Clamp")


def inspect(name: str) -> dict[str, Any]:
    """Say what this package finds in a model; what ``timm-csg inspect --json`` prints.

    Of a timm name or a checkpoint without a mechanism nothing but the config is read: no weights are downloaded, and
    none are made (the layers are built on the meta device). A checkpoint with a mechanism is loaded.

    Args:
        name: A timm model name; a checkpoint folder, also as ``local-dir:folder``; a Hub repository ``user/name``, also
            as ``hf-hub:user/name``.

    Returns:
        JSON-able values. Always: ``name``, ``source`` (``"timm"``, ``"plain checkpoint"`` or ``"checkpoint"``),
        ``architecture``, ``num_classes``, ``input_size``, ``parameters``, ``supported`` and ``refused`` (why, or None).
        If supported: ``stage``, ``head``, ``mechanisms`` and ``explanations``; with a mechanism: ``differentiated``.

    Raises:
        ValueError: If there is no such model; as ``CheckpointError`` also if a checkpoint is damaged.
        HubError: If the Hub cannot be reached or has no such repository.

    Example:
        >>> found = inspect("test_resnet")
        >>> found["stage"]["name"], found["head"]["kind"], found["supported"]
        ('layer4', 'linear', True)
        >>> inspect("crossvit_9_240")["supported"]
        False
    """
    model, source, timm_name = open_checkpoint(name, weights=False)
    plain = _plain_skeleton(model)
    found: dict[str, Any] = {
        "name": name,
        "source": source,
        "architecture": plain.pretrained_cfg.get("architecture") or type(plain).__name__,
        "num_classes": int(getattr(plain, "num_classes", 0)),
        "input_size": [int(size) for size in get_model_input_config(plain)["input_size"]],
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
    }
    try:
        stage = find_stage(plain)
    except (TypeError, ValueError) as error:
        return found | {"supported": False, "refused": str(error)}
    images = torch.zeros(1, *found["input_size"], device="meta")
    with torch.no_grad():
        features = plain.eval().forward_features(images)  # once, for all that only asks what follows
    head = _head(plain, stage, features) | ({"kind": model.head_kind} if is_differentiated(model) else {})
    found |= {
        "supported": True,
        "refused": None,
        "stage": {key: getattr(stage, key) for key in ("name", "num_filters", "layout", "grid", "signed")},
        "head": head,
        "mechanisms": [
            _mechanism(plain, features, mechanism) for mechanism in list_mechanisms() if mechanism != "chain"
        ],
        "explanations": _explanations(plain, head["kind"], _has_grid(plain, stage, timm_name), head.pop("sees_places")),
    }
    if is_differentiated(model):
        found["differentiated"] = _differentiated(model, name)
    return found


def _plain_skeleton(model: nn.Module) -> Any:
    """A copy without mechanism and without memory."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    twin = copy.deepcopy(model, memo).to("meta")
    return undifferentiate(twin) if is_differentiated(twin) else twin


def _mechanism(plain: nn.Module, features: Tensor, name: str) -> dict[str, Any]:
    """Whether a mechanism can be put into the model, and what it adds with its default options."""
    try:
        model: Any = differentiate(copy.deepcopy(plain), mechanism=name)
        with torch.no_grad():
            model.mechanism(features)  # some need a grid, and only notice now that it is missing
    except (TypeError, ValueError) as error:
        return {"name": name, "applies": False, "reason": str(error), "parameters": None}
    added = sum(parameter.numel() for parameter in model.mechanism.parameters())
    return {"name": name, "applies": True, "reason": None, "parameters": added}


def _head(plain: Any, stage: Stage, features: Tensor) -> dict[str, Any]:
    """Kind and classifier of a head whose weights are not there: probed with random ones, in its own layers only."""
    used: list[nn.Module] = [plain]
    track = nn.modules.module.register_module_forward_pre_hook
    with torch.no_grad(), track(lambda module, inputs: used.append(module)):
        plain.forward_head(features)
    names = {name: module for name, module in plain.named_modules() if any(module is other for other in used)}
    model = copy.deepcopy(plain).to_empty(device="cpu")  # reserves address space; memory is used only where written
    noise = torch.randn(65537, generator=torch.Generator().manual_seed(0), device="cpu")
    for name in names:
        _fill_(model.get_submodule(name), noise)
    classifier = find_classifier(plain)
    named = next((name for name, module in plain.named_modules() if module is classifier), "")
    return {
        "kind": probe_head(model, stage.num_filters),
        "classifier": {"name": named, "layer": str(classifier)},
        "sees_places": _sees_places(model, features.shape),
    }


@torch.no_grad()
def _fill_(module: nn.Module, noise: Tensor) -> None:
    """Random values for a module's own tensors: weights of the scale of their input, scales and variances around 1."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            values = noise / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 1 + 0.1 * noise
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(values[: len(part)])


def _sees_places(model: Any, shape: torch.Size) -> bool:
    """Whether the logits depend on the places of a map; not so where the head reads a class token only."""
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    if len(shape) == 4 or not prefix:
        return True
    features = torch.rand(shape, generator=torch.Generator().manual_seed(0), device="cpu").requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(features).sum(), features)
    return bool(gradient[:, prefix:].any())


def _has_grid(plain: nn.Module, stage: Stage, timm_name: str) -> bool:
    """Whether the features are maps, or tokens that can be laid over the image."""
    if stage.grid is not None:
        return True
    images = torch.zeros(1, *get_model_input_config(plain)["input_size"], device="cpu")
    try:
        explain.filter_maps(plain, images.to("meta"), upsample=False)
    except ValueError:
        return False
    except RuntimeError:  # timm has a map, and only values can tell whether it holds the tokens in their order
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(timm_name, pretrained=False)
        try:
            explain.filter_maps(model, images, upsample=False)
        except ValueError:
            return False
    return True


def _explanations(plain: nn.Module, head_kind: str, has_grid: bool, sees_places: bool) -> list[dict[str, Any]]:
    """Which methods of ``timm_csg.explain`` apply, and why the others do not."""
    images = torch.zeros(1, *get_model_input_config(plain)["input_size"], device="meta")
    counts = explain.activation_counts(plain, images)
    others = {name: count for name, count in counts.items() if name not in _RECTIFIERS}
    named = ", ".join(f"{count} x {name}" for name, count in (others or {"no activation function": 1}).items())
    no_relu = f"the rule is for ReLUs, and the model has {named}" if others or not counts else None
    no_grid = None if has_grid else "the features are tokens without a grid"
    not_linear = None if head_kind == "linear" else f"needs pooling, then linear; the head is of kind {head_kind!r}"
    no_places = None if sees_places else "the head reads a class token only"
    reasons = {
        "gradient": None,
        "deconvnet": no_relu,
        "guided_backprop": no_relu,
        "cam": no_grid or not_linear or no_places,
        "grad_cam": no_grid or no_places,
        "guided_grad_cam": no_relu or no_grid or no_places,
        "filter_maps": no_grid,
        "class_filters": None,
    }
    return [{"name": name, "applies": reason is None, "reason": reason} for name, reason in reasons.items()]


def _differentiated(model: DifferentiatedModel, name: str) -> dict[str, Any]:
    """The mechanism of a checkpoint, the owners of its filters, and what its files record."""
    mechanism, folder = model.mechanism, checkpoint_folder(name)
    matrix = mechanism.class_filter_matrix()
    result: dict[str, Any] = {
        "mechanism": mechanism.name,
        "config": mechanism.config.to_dict(),
        "parameters": sum(parameter.numel() for parameter in mechanism.parameters()),
        "density": None,
        "owners": None,
        "class_names": class_names(model),
        "metrics": None,
    }
    if matrix is not None:
        result |= {"density": float(metrics.gate_density(matrix)), "owners": metrics.owners(matrix).tolist()}
    if folder is not None:
        found = Manifest.read(folder)
        result |= {key: found.own.get(key) for key in ("versions", "base_model", "base_revision")}
        result["metrics"] = found.metrics()
    return result
