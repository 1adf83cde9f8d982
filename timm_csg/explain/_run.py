"""What every explanation shares: a model borrowed without a trace, and the features and gradients of its last stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import check_choice
from timm_csg.explain.inputs import Images, as_batch, class_by_name
from timm_csg.hooks import check_hooks
from timm_csg.mechanisms.base import Mechanism
from timm_csg.model import is_differentiated
from timm_csg.running import as_input, check_whole
from timm_csg.stage import check_supported, is_channels_last

Path = Literal["standard", "gated"]
Targets = Tensor | list[int] | list[str] | int | str | None


def unwrap(model: nn.Module) -> Any:
    """The timm model inside ``torch.compile``, DistributedDataParallel or DataParallel; explanations run that one.

    Raises:
        TypeError, ValueError: If what is inside is not a timm classifier with one feature tensor, or is sharded.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        else:
            break
    if getattr(inner, "_compiled_call_impl", None) is None:  # model.compile() in place: the model is its own original
        check_supported(inner)
    check_whole(inner)
    return inner


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Any]:
    """The timm model in eval mode with frozen parameters and gradients enabled; everything as found afterwards.

    Works inside ``no_grad`` and ``inference_mode``. Frozen parameters keep ``.grad`` untouched and save the memory that
    gradients of weights would need. Cached attention biases (LeViT, TinyViT, ...) are put back too: they would hold a
    graph, and would be stale after the next optimizer step.
    """
    inner = unwrap(model)
    modules = list(inner.modules())
    training = [module for module in modules if module.training]
    parameters = (parameter for module in modules for parameter in module._parameters.values())
    frozen = [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
    caches = {
        module: module.__dict__["attention_bias_cache"]
        for module in modules
        if isinstance(module.__dict__.get("attention_bias_cache"), dict)
    }
    try:
        for module in training:
            module.training = False
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in caches:
            module.attention_bias_cache = {}
        with torch.inference_mode(False), torch.enable_grad():
            check_hooks(inner)
            yield inner
    finally:
        for module, cache in caches.items():
            module.attention_bias_cache = cache
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def looking_at(model: nn.Module, images: Images) -> Iterator[tuple[Any, Tensor]]:
    """``borrowed``, and the images as a batch for that model: how every explanation begins."""
    with borrowed(model) as inner:
        yield inner, as_batch(inner, images)


def class_indices(targets: Targets, logits: Tensor, model: Any = None) -> Tensor:
    """Class indices [batch]: those given, one for all images, or the predicted ones; names are looked up in the model.

    Raises:
        TypeError, ValueError: If targets are not one class index per image.
    """
    batch, num_classes = logits.shape
    if targets is None:
        return logits.detach().argmax(dim=1)
    targets = class_by_name(model, targets)
    try:
        indices = torch.as_tensor(targets, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"targets must be class indices, but are {targets!r}; pass the number of a class, counted from 0, or the "
            "name of one."
        ) from error
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.is_complex():
        raise TypeError(f"targets must be class indices, but are {indices.dtype}; pass targets.argmax(1) for one-hot.")
    indices = indices.long().expand(batch) if indices.ndim == 0 else indices.long()
    if indices.shape != (batch,):
        raise ValueError(
            f"there are {batch} images, but targets have shape {list(indices.shape)}; pass one class per image."
        )
    if int(indices.min()) < 0 or int(indices.max()) >= num_classes:
        raise ValueError(
            f"targets must be between 0 and {num_classes - 1}, the model's classes, but are {indices.tolist()}."
        )
    return indices


class StageRun(NamedTuple):
    """One pass through the head, in the layout of the model.

    Attributes:
        features: What the head sees: the stage's output, behind the mask of a mechanism that acts at inference. A gate
            is not applied to them; it shows in the gradient.
        gradient: Gradient of the target class's logit, of the path asked for, with respect to ``features``.
        logits: Logits of that path [batch, classes].
        targets: Class indices [batch] that are explained.
    """

    features: Tensor
    gradient: Tensor
    logits: Tensor
    targets: Tensor


def masked(model: Any, features: Tensor) -> Tensor:
    """The stage's output through the mask of a mechanism that acts at inference; as it is for all others."""
    if is_differentiated(model) and model.mechanism.acts_without_targets:
        return model.mechanism(features)  # type: ignore[no-any-return]
    return features


def run_head(model: Any, features: Tensor, targets: Targets, path: Path = "standard") -> StageRun:
    """Logits and their gradient with respect to what the head sees of these features; inside ``borrowed``.

    Raises:
        ValueError: If there is no gated path, or the logits do not depend on the features.
    """
    check_choice("path", path, ("standard", "gated"))
    if path == "gated" and not is_differentiated(model):
        raise ValueError(f"{type(model).__name__} has no gated path; differentiate() it first, or use path='standard'.")
    leaf = features.detach().requires_grad_()
    with _behind_masks(model, leaf) as seen:
        logits = model.forward_head(leaf.clone())  # heads may work in place
        indices = class_indices(targets, logits, model)
    if path == "gated":
        with _behind_masks(model, leaf) as seen:
            logits = model.forward_head(leaf.clone(), targets=indices)
    (gradient,) = torch.autograd.grad(picked(logits, indices).sum(), seen[-1], allow_unused=True)
    if gradient is None and any(".quantized." in type(module).__module__ for module in model.modules()):
        raise ValueError(
            f"quantised layers in {type(model).__name__} pass no gradient back, which explanations need; explain the "
            "model from before the conversion."
        )
    if gradient is None:
        raise ValueError(
            f"the logits of {type(model).__name__} do not depend on its last stage's features, so there is nothing to "
            "explain; use explain.gradient."
        )
    return StageRun(seen[-1].detach(), gradient, logits.detach(), indices)


@contextmanager
def _behind_masks(model: Any, features: Tensor) -> Iterator[list[Tensor]]:
    """Collect the features, and what each mechanism that acts at inference makes of them; the head sees the last."""
    seen = [features]

    def collect(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output.clone()  # heads may work in place

    mechanisms = model.mechanism.modules() if is_differentiated(model) else ()
    acting = [part for part in mechanisms if isinstance(part, Mechanism) and part.acts_without_targets]
    handles = [part.register_forward_hook(collect) for part in acting]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_stage(model: Any, images: Tensor, targets: Targets, path: Path = "standard") -> StageRun:
    """Features of the images without a graph, and ``run_head`` on them; inside ``borrowed``."""
    with torch.no_grad():
        features = model.forward_features(as_input(model, images))
    return run_head(model, features, targets, path)


def picked(logits: Tensor, targets: Tensor) -> Tensor:
    """The logit of each image's target class [batch]."""
    return logits.gather(1, targets[:, None]).squeeze(1)


def per_filter(model: Any, features: Tensor) -> Tensor:
    """Features of any layout as [batch, filters, positions], prefix tokens included."""
    if features.ndim == 4 and not is_channels_last(model):
        return features.flatten(2)
    return features.flatten(1, -2).transpose(1, 2)


def resized(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [batch, any, height, width] bilinearly to the size of the images."""
    return F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)


def readable(values: Tensor) -> Tensor:
    """Detached, and float32 where the model computes in half precision."""
    values = values.detach()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
