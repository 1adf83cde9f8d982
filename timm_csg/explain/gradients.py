"""Explanations in the pixels: gradient, deconvnet and guided backprop. They differ only in the rule at a ReLU.

With the ReLU's input x and the signal R that arrives from above, what goes on below is

* gradient (Simonyan et al., 2014, https://arxiv.org/abs/1312.6034): R where x > 0,
* deconvnet (Zeiler & Fergus, ECCV 2014, https://arxiv.org/abs/1311.2901): R where R > 0,
* guided backprop (Springenberg et al., ICLR 2015 workshop, https://arxiv.org/abs/1412.6806): R where both hold.

The rule is set on the nodes of the autograd graph of one pass, not on modules. So functional, in-place and repeatedly
used ReLUs are all found, nothing is swapped or hooked in the model, and the nodes vanish with the graph.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_csg.explain._run import Targets, class_indices, looking_at, picked, readable
from timm_csg.explain.inputs import Images
from timm_csg.running import as_input

Rule = Literal["gradient", "deconvnet", "guided"]

_RECTIFIERS = {"ReluBackward0": "ReLU", "HardtanhBackward0": "ReLU6", "ThresholdBackward0": "Threshold"}
_CLAMPS = {"ClampBackward1": "Clamp", "ClampMinBackward0": "Clamp"}
_OTHERS = {
    "CeluBackward0": "CELU",
    "EluBackward0": "ELU",
    "GeluBackward0": "GELU",
    "HardswishBackward0": "Hardswish",
    "LeakyReluBackward0": "LeakyReLU",
    "LeakyReluBackward1": "LeakyReLU",
    "LogSigmoidBackward0": "LogSigmoid",
    "MishBackward0": "Mish",
    "PreluKernelBackward0": "PReLU",
    "RreluWithNoiseBackward0": "RReLU",
    "SiluBackward0": "SiLU",
    "SoftplusBackward0": "Softplus",
    "TanhBackward0": "Tanh",
}
_GATES = ("SigmoidBackward0", "HardsigmoidBackward0")


def gradient(model: nn.Module, images: Images, targets: Targets = None) -> Tensor:
    """Gradient of the target class's logit with respect to the pixels.

    Args:
        model: A timm classifier, plain or differentiated; also one wrapped by ``torch.compile`` or DDP. Runs in eval
            mode; modes, gradients and buffers are left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: the predicted class of each image.

    Returns:
        [batch, channels, height, width], logit per unit of the normalised image, float32 for half-precision models.
        The usual picture of it is the largest absolute value over channels: ``gradient(...).abs().amax(1)``.

    Raises:
        TypeError: If the model is not a timm classifier, or images or targets have the wrong type.
        ValueError: If images or targets have the wrong shape or range.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> gradient(model, torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    return _in_the_pixels(model, images, targets, "gradient")


def deconvnet(model: nn.Module, images: Images, targets: Targets = None) -> Tensor:
    """The target class's logit projected back to the pixels by a deconvnet (Zeiler & Fergus, ECCV 2014).

    Convolutions are transposed, max pooling is undone with the switches of this image, and every ReLU keeps the
    positive part of the signal from above, whatever its input was. Scales of BatchNorm are applied, biases have no
    counterpart. ReLU6 and other rectifiers with a ceiling count as ReLU.

    Args:
        model: A timm classifier whose activations are all ReLUs (module, functional, in place, used twice: all found);
            see ``gradient`` for the rest.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: the predicted class of each image.

    Returns:
        [batch, channels, height, width], no unit.

    Raises:
        TypeError: See ``gradient``.
        ValueError: If the model has no ReLU, or also other activations, for which the method has no rule.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> deconvnet(model, torch.zeros(1, 3, 32, 32), 1).shape
        torch.Size([1, 3, 32, 32])
    """
    return _in_the_pixels(model, images, targets, "deconvnet")


def guided_backprop(model: nn.Module, images: Images, targets: Targets = None) -> Tensor:
    """Gradient that at every ReLU drops what is negative from above or was negative below (Springenberg et al., 2015).

    Args:
        model: A timm classifier whose activations are all ReLUs, as for ``deconvnet``.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images; None: the predicted class of each image.

    Returns:
        [batch, channels, height, width], no unit.

    Raises:
        TypeError: See ``gradient``.
        ValueError: If the model has no ReLU, or also other activations, for which the method has no rule.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> guided_backprop(model, torch.zeros(1, 3, 32, 32), 1).shape
        torch.Size([1, 3, 32, 32])
    """
    return _in_the_pixels(model, images, targets, "guided")


def activation_counts(model: nn.Module, images: Images) -> dict[str, int]:
    """How often each activation function is applied between the pixels and the logits of one pass.

    Deconvnet and guided backprop need ReLU, ReLU6, Threshold or Clamp at 0 only. Sigmoids and softmaxes that multiply
    features (squeeze-and-excitation, attention) are not counted: they are passed as in the gradient.

    Args:
        model: A timm classifier.
        images: As for ``gradient``; the first one is used.

    Returns:
        Number of calls by name.

    Example:
        >>> import timm
        >>> activation_counts(timm.create_model("test_resnet"), torch.zeros(1, 3, 32, 32))
        {'ReLU': 12}
    """
    with looking_at(model, images) as (inner, images):
        leaf = as_input(inner, images[:1], copy=True).requires_grad_()
        rectifiers, others, _ = _activations(inner.forward_head(inner.forward_features(leaf)))
        return dict(sorted((Counter(name for _, name in rectifiers) + others).items()))


def _in_the_pixels(model: nn.Module, images: Images, targets: Targets, rule: Rule) -> Tensor:
    with looking_at(model, images) as (inner, images):
        return readable(backward_with_features(inner, images, targets, rule)[0])


def backward_with_features(model: Any, images: Tensor, targets: Targets, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The signal in the pixels, the stage's features of the same pass, and the class indices; inside ``borrowed``."""
    leaf = as_input(model, images, copy=True).requires_grad_()
    features = model.forward_features(leaf)
    seen = features.clone()  # heads may work in place
    logits = model.forward_head(seen)
    indices = class_indices(targets, logits, model)
    if rule != "gradient":
        _set_rule(model, images, logits, rule)
    (signal,) = torch.autograd.grad(picked(logits, indices).sum(), leaf)
    return signal, features.detach(), indices


def _set_rule(model: Any, images: Tensor, logits: Tensor, rule: Rule) -> None:
    rectifiers, others, hides = _activations(logits)
    if hides:
        others = others + _hidden(model, images, len(rectifiers) + others.total())
    if others or not rectifiers:
        method = "the deconvnet" if rule == "deconvnet" else "guided backprop"
        found = ", ".join(f"{count} x {name}" for name, count in sorted(others.items())) or "no activation function"
        also = f" next to {len(rectifiers)} x ReLU" if others and rectifiers else ""
        raise ValueError(
            f"{method} is a rule for ReLUs, but {type(model).__name__} has {found}{also}; use explain.grad_cam, or "
            "explain.gradient for pixels."
        )
    for node, _ in rectifiers:
        node.register_hook(_keep_positive_from_above if rule == "deconvnet" else _keep_positive_below)


def _keep_positive_from_above(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (F.relu(above[0]), *below[1:])


def _keep_positive_below(below: tuple[Tensor, ...], above: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (F.relu(below[0]), *below[1:])


def _activations(logits: Tensor) -> tuple[list[tuple[Any, str]], Counter[str], bool]:
    """Rectifier nodes with their names, counts of other activations, and whether the graph hides an in-place call."""
    rectifiers: list[tuple[Any, str]] = []
    others: Counter[str] = Counter()
    hides = False
    for node in _nodes(logits):
        name = node.name()
        if name in _RECTIFIERS or name in _CLAMPS:
            floor = _floor(node)
            if floor == 0:
                rectifiers.append((node, {**_RECTIFIERS, **_CLAMPS}[name]))
            elif name not in _CLAMPS:
                others["Hardtanh" if name == "HardtanhBackward0" else "Threshold above 0"] += 1
        elif name in _OTHERS:
            others[_OTHERS[name]] += 1
        elif name == "MulBackward0" and _multiplies_by_own_sigmoid(node):
            others["SiLU"] += 1
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            others[name.removesuffix("Backward")] += 1
        hides = hides or name.endswith("CopySlices")
    return rectifiers, others, hides


def _nodes(logits: Tensor) -> list[Any]:
    """Every node between logits and images once; parameters are frozen and have none."""
    found: dict[Any, None] = {}
    waiting: list[Any] = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting.extend(below for below, _ in node.next_functions)
    return list(found)


def _floor(node: Any) -> float | None:
    """The value below which a rectifier is flat."""
    for name in ("_saved_min_val", "_saved_threshold", "_saved_min"):
        if hasattr(node, name):
            value = getattr(node, name)
            return None if value is None else float(value)
    return 0.0


def _multiplies_by_own_sigmoid(node: Any) -> bool:
    """Whether a product is x · sigmoid(x) or x · sigmoid(constant · x), which are SiLU and the fast GELU."""
    factors = [below for below, _ in node.next_functions if below is not None]
    for gate in factors:
        if gate.name() in _GATES:
            inner = gate.next_functions[0][0]
            scaled = inner is not None and inner.name() == "MulBackward0"
            reached = {inner, *([below for below, _ in inner.next_functions] if scaled else [])}
            if any(factor is not gate and factor in reached for factor in factors):
                return True
    return False


def _hidden(model: Any, images: Tensor, visible: int) -> Counter[str]:
    """Activations that work in place on part of a tensor do not show in the graph; count all calls to notice them."""
    with torch.no_grad(), _CallCounter() as calls:
        model.forward_head(model.forward_features(as_input(model, images[:1])))
    missing = calls.count - visible
    return Counter({"activation in place on part of a tensor": missing}) if missing > 0 else Counter()


class _CallCounter(TorchDispatchMode):
    """Counts calls of activation functions."""

    # fmt: off
    names = frozenset([
        "relu", "hardtanh", "relu6", "threshold", "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "mish",
        "softplus", "tanh", "prelu", "_prelu_kernel", "rrelu_with_noise", "log_sigmoid_forward",
    ])
    # fmt: on

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__.removesuffix("_") in self.names
        return func(*args, **(kwargs or {}))
