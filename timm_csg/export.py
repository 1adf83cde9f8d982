"""One file that answers and explains: logits, evidence of every class, a heat map and responses, without a gradient.

A class that owns its filters has an explanation that is a sum: its own filters' responses, each times its classifier
weight. That is forward only, so it can be written into a graph and be served without PyTorch and without this package.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import nn
from torch.export import Dim, ExportedProgram

from timm_csg.checkpoint import replacing
from timm_csg.explain._run import borrowed
from timm_csg.explained import OUTPUTS, ExplainedModel
from timm_csg.labels import data_config, label_entries
from timm_csg.model import is_differentiated
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
_PREDICTED = -1
_MOST_BYTES = 2**31 - 2**20  # of one ONNX file; protobuf ends at 2 GiB


class Exported(NamedTuple):
    """What ``export_onnx`` returns.

    Attributes:
        path: The file.
        outputs: Names of its outputs, in order.
        missing: Outputs that were asked for and are not there, each with the reason.
    """

    path: Path
    outputs: tuple[str, ...]
    missing: dict[str, str]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = OUTPUTS,
    upsample: bool = True,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a differentiated model and its explanations to one ONNX file, for batches of any size.

    Inputs are ``images`` [batch, channels, height, width], normalised as in training, and ``target``, int64 [1] or
    [batch]: the class whose map is wanted. It can be left out: by default it is -1, the predicted class. Outputs are
    ``logits`` [batch, classes]; ``evidence`` [batch, classes], what each class's own filters add to its logit; ``map``
    [batch, height, width], what each place adds to the evidence of the target, see ``explain.owner_map``; and
    ``responses``, those of the last stage as the head sees them [batch, filters, height, width] ([batch, filters,
    tokens] without a grid). Before up-sampling, the sum of a map is the evidence; with assigned filters, whose
    classifier is masked, evidence plus bias is the logit.

    Evidence exists where the head is pooling → linear and filters have owners; a map also needs places that the head
    reads with fixed weights, as in a mean. Where one does not exist, the file is written without it, and a warning, the
    result and the file's metadata say why. The metadata (strings) has ``timm_csg``, the version; ``architecture``;
    ``mechanism``; in JSON ``preprocessing``, as ``timm.data.resolve_data_config`` returns it, and ``class_names``, if
    they are known; and ``evidence`` and ``map``, what they are or why they are missing.

    Args:
        model: Any differentiated model; left as found.
        path: The file, replaced only when the new one is complete.
        outputs: Which of the outputs; ``("logits",)`` makes a plain classifier.
        upsample: Whether maps have the size of the images (bilinear) or that of the stage's grid.
        class_names: One for each class; None: those that the model was loaded with, if any.
        preprocessing: What differs from ``model.pretrained_cfg``, see ``save_pretrained``; ``input_size`` decides the
            size of the images, which is fixed in the file.

    Returns:
        The file, its outputs, and what is missing and why.

    Raises:
        ImportError: If onnx or onnxscript is missing; the message names the extra.
        TypeError: If the model is not differentiated.
        ValueError: If the path is a folder or lies in none, an output is unknown, names or preprocessing do not suit
            the model, the file would be larger than 2 GB, or PyTorch's exporter cannot convert the architecture.
        OSError: If the file cannot be written.
    """
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        raise ImportError("the export to ONNX needs onnx and onnxscript: pip install 'timm_csg[export]'.")
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as {path / 'model.onnx'}.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; create it, or choose another one.")
    with _explained(model, outputs, upsample, preprocessing) as (explained, config):
        labels = label_entries(explained.model, class_names)
        tensors = [*explained.model.parameters(), *explained.model.buffers()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > _MOST_BYTES:
            raise ValueError(
                f"{type(explained.model).__name__} has {size / 1e9:.1f} GB of weights, but one ONNX file holds at most "
                "2 GB; export it in half precision, model.half(), or use export_program."
            )
        with _written_out_attention(explained.model):
            program = _program(explained)
        converted = _converted(explained, program)
        if "map" in explained.outputs:
            _let_target_be_left_out(converted.model.graph)
        converted.model.metadata_props.update(_metadata(explained, config, labels))
        with replacing(path) as temporary:
            converted.save(temporary, external_data=False)
    return Exported(path, explained.outputs, explained.missing)


def export_program(
    model: nn.Module,
    *,
    outputs: Sequence[str] = OUTPUTS,
    upsample: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """The same as a ``torch.export`` program, for ``torch.export.save``, AOTInductor or ExecuTorch.

    Called as ``program.module()(images, target)``, with ``target`` int64 [1] or [batch], -1 for the predicted class; it
    is there only if a map is. The result is a dictionary of outputs, see ``export_onnx``. As always with
    ``torch.export``, the program shares its weights with the model.

    Args:
        model: Any differentiated model; left as found.
        outputs: Which of the outputs.
        upsample: Whether maps have the size of the images (bilinear) or that of the stage's grid.
        preprocessing: See ``export_onnx``.

    Returns:
        The program, for batches of any size.

    Raises:
        TypeError, ValueError: As ``export_onnx``.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5))
        >>> program = export_program(model, preprocessing={"input_size": (3, 64, 64)})
        >>> found = program.module()(torch.zeros(4, 3, 64, 64), torch.tensor([-1]))
        >>> {name: list(value.shape) for name, value in found.items()}
        {'logits': [4, 5], 'evidence': [4, 5], 'map': [4, 64, 64], 'responses': [4, 96, 2, 2]}
    """
    with _explained(model, outputs, upsample, preprocessing) as (explained, _):
        return _program(explained)


@contextmanager
def _explained(
    model: nn.Module, outputs: Sequence[str], upsample: bool, preprocessing: Mapping[str, Any] | None
) -> Iterator[tuple[ExplainedModel, dict[str, Any]]]:
    """The model with its explanations, inside ``borrowed``, and its preprocessing; what is missing is logged."""
    unknown = [outputs] if isinstance(outputs, str) else [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise ValueError(f"outputs must be some of {', '.join(OUTPUTS)}, but are {outputs!r}.")
    with borrowed(model) as inner:
        if not is_differentiated(inner):
            raise TypeError(
                f"expected a differentiated model, but {type(inner).__name__} is plain and has no filters with owners; "
                "differentiate() and train it, or export it with torch.onnx.export."
            )
        config = _complete(inner, preprocessing)
        explained = ExplainedModel(inner, outputs, upsample, config["input_size"])
        if not explained.outputs:
            raise ValueError(f"there is nothing to export: {'; '.join(explained.missing.values())}.")
        for name, reason in explained.missing.items():
            _logger.warning("exported without %s: %s", name, reason)
        yield explained, config


def _complete(model: Any, preprocessing: Mapping[str, Any] | None) -> dict[str, Any]:
    given = data_config(preprocessing) or {}
    size = given.get("input_size") or get_model_input_config(model)["input_size"]
    known: dict[str, Any] = resolve_data_config({}, pretrained_cfg=getattr(model, "pretrained_cfg", None) or {})
    return (data_config(known) or {}) | given | {"input_size": tuple(size)}


@torch.no_grad()
def _program(explained: ExplainedModel) -> ExportedProgram:
    predicted = torch.full((1,), _PREDICTED, device=explained.images.device)
    inputs = {"images": explained.images, "target": predicted}
    sizes: dict[str, Any] = {"images": {0: Dim("batch")}, "target": None}
    try:
        return torch.export.export(
            explained,
            tuple(inputs[name] for name in explained.inputs),
            dynamic_shapes={name: sizes[name] for name in explained.inputs},
        )
    except RuntimeError as error:  # what depends on the batch, or on values
        raise ValueError(
            f"torch.export cannot trace {type(explained.model).__name__} for batches of any size: {error}"
        ) from error


def _converted(explained: ExplainedModel, program: ExportedProgram) -> Any:
    """The program as one of ONNX, with our names."""
    try:
        return torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes={name: {0: "batch"} if name == "images" else None for name in explained.inputs},
            input_names=list(explained.inputs),
            output_names=list(explained.outputs),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"{type(explained.model).__name__} has an operation that torch.onnx cannot convert; export_program may "
            f"still work. The reason: {error.__cause__ or error}"
        ) from error


@contextmanager
def _written_out_attention(model: nn.Module) -> Iterator[None]:
    """Attention as products and a softmax: the exporter takes fused ones of four dimensions only (NesT has five)."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _metadata(explained: ExplainedModel, preprocessing: dict[str, Any], labels: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself."""
    config = getattr(explained.model, "pretrained_cfg", None) or {}
    told = {
        "timm_csg": __version__,
        "architecture": str(config.get("architecture") or type(explained.model).__name__),
        "mechanism": explained.model.mechanism.name,
        "preprocessing": json.dumps(preprocessing),
        "evidence": "what the filters that a class owns add to its logit",
        "map": "what each place adds to the evidence of the target (-1: the predicted class)"
        + (", up-sampled to the image" if explained.upsample else ""),
    }
    told = {name: text for name, text in told.items() if name not in OUTPUTS or name in explained.outputs}
    told |= {name: f"missing: {reason}" for name, reason in explained.missing.items()}
    if "label_names" in labels:
        told["class_names"] = json.dumps(labels["label_names"])
    return told


def _let_target_be_left_out(graph: Any) -> None:
    """Give the input ``target`` a default, an initializer of its name, and any length."""
    import onnx_ir

    [target] = [value for value in graph.inputs if value.name == "target"]
    target.const_value = onnx_ir.tensor([_PREDICTED], dtype=onnx_ir.DataType.INT64, name="target")
    graph.register_initializer(target)
    target.shape = onnx_ir.Shape(["targets"])
