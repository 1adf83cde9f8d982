"""Where the last stage of a timm model ends, and what comes out of it.

Every classifier of timm computes ``forward_head(forward_features(images))``; what passes between the two is the stage's
output. ``feature_info[-1]`` is not used: in 170 architectures it is another, earlier map.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Layout = Literal["NCHW", "NHWC", "NLC"]


@dataclass(frozen=True)
class Stage:
    """The last stage of a model, as ``find_stage`` measured it.

    Attributes:
        name: The module whose output is the stage's output, or ``"forward_features"`` if no single module returns it.
        num_filters: Width of the output.
        layout: ``"NCHW"``, ``"NHWC"`` or ``"NLC"`` (tokens).
        grid: Height and width of the map for the model's input size; None for tokens without a grid.
        signed: Whether values can be negative: False where the last operations (ReLU, pooling, ...) exclude it.
    """

    name: str
    num_filters: int
    layout: Layout
    grid: tuple[int, int] | None
    signed: bool

    def __str__(self) -> str:
        grid = "no grid" if self.grid is None else f"grid {self.grid[0]}x{self.grid[1]}"
        sign = "signed values" if self.signed else "values >= 0"
        return f"{self.name}: {self.num_filters} filters, {self.layout}, {grid}, {sign}"


def check_supported(model: nn.Module) -> None:
    """Raise unless the model is a timm classifier whose stage outputs one tensor.

    Raises:
        TypeError: If it is wrapped, compiled, a feature extractor, headless, or not a timm model; the message says what
            to pass instead.
        ValueError: If its features are a list.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a timm model, but found {kind}; pass timm.create_model(...).")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"found a model wrapped in {kind}; call this on the inner model, before wrapping it.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError("found a compiled model; call this on the original model, then compile it (again).")
    if type(model).__module__.startswith("timm.models._features"):
        raise TypeError(
            f"found {kind}, a feature extractor without a classifier; create the model without features_only."
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        raise TypeError(f"found a scripted or traced model ({kind}); call this on the original timm model.")
    seam = ("forward_features", "forward_head", "get_classifier", "reset_classifier")
    missing = [name for name in seam if not hasattr(model, name)]
    if missing:
        if hasattr(model, "forward_features"):
            raise TypeError(
                f"{kind} is an encoder without a classifier; use that of the same family (the name without '_enc')."
            )
        raise TypeError(
            f"{kind} is not a timm classifier: it lacks {', '.join(missing)}. Pass timm.create_model(...); timm has "
            "the same architecture as most torchvision models."
        )
    if _features_are_a_list(model):
        raise ValueError(
            f"the features of {kind} are several tensors, so there is no one last stage whose filters could have "
            "owners; use a model with one stream (for CoaT a coat_lite_*, else for example a resnet, convnext or vit)."
        )


def _features_are_a_list(model: nn.Module) -> bool:
    kind = type(model).__name__
    if kind == "CoaT":
        return model.parallel_blocks is not None or bool(model.return_interm_layers)
    if kind == "InceptionV3":
        return bool(model.aux_logits)
    return kind in ("CrossVit", "EfficientViM", "EfficientViMDistilled")


def is_channels_last(model: nn.Module) -> bool:
    """Whether the model's 4-D features are [batch, height, width, filters]; timm says so in ``output_fmt``."""
    return str(getattr(model, "output_fmt", "NCHW")) == "NHWC"


def find_stage(model: nn.Module) -> Stage:
    """Find and measure a timm model's last stage without computing anything.

    The model's shapes run through ``forward_features`` on fake tensors, in a copy that shares no state with the model,
    which takes a fraction of a second and leaves the model untouched.

    Args:
        model: A timm classifier, plain or differentiated.

    Returns:
        The stage; ``print`` it.

    Raises:
        TypeError, ValueError: If the model is not supported, see ``check_supported``.

    Example:
        >>> import timm
        >>> print(find_stage(timm.create_model("test_resnet")))
        layer4: 96 filters, NCHW, grid 5x5, values >= 0
    """
    check_supported(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        memo: dict[int, Any] = {
            id(tensor): fake.from_tensor(tensor.detach()) for tensor in chain(model.parameters(), model.buffers())
        }
        with _FakeCopies(fake):
            clone: Any = copy.deepcopy(model, memo).eval()
        dtype = next((tensor.dtype for tensor in clone.parameters() if tensor.is_floating_point()), torch.float32)
        device = next((tensor.device for tensor in clone.parameters()), torch.device("cpu"))
        images = torch.zeros(1, *get_model_input_config(model)["input_size"], dtype=dtype, device=device)
        returned: list[tuple[str, Any]] = []
        for name, module in clone.named_modules():
            if name:
                module.register_forward_hook(lambda module, inputs, output, name=name: returned.append((name, output)))
        with _SignTracker() as signs:
            features = clone.forward_features(images)
    if not isinstance(features, Tensor):
        raise ValueError(f"the features of {type(model).__name__} are a {type(features).__name__}, not one tensor.")
    name = next((name for name, output in reversed(returned) if output is features), "forward_features")
    layout: Layout = "NLC" if features.ndim < 4 else "NHWC" if is_channels_last(model) else "NCHW"
    num_filters = features.shape[1 if layout == "NCHW" else -1]
    return Stage(name, int(num_filters), layout, _grid(model, features, layout), signed=features not in signs)


def _grid(model: nn.Module, features: Tensor, layout: Layout) -> tuple[int, int] | None:
    if layout != "NLC":
        height, width = features.shape[2:] if layout == "NCHW" else features.shape[1:3]
        return int(height), int(width)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", 0) or 0
    if features.ndim == 3 and grid is not None and grid[0] * grid[1] == features.shape[1] - prefix:
        return int(grid[0]), int(grid[1])
    return None


def seen_features(model: nn.Module, images: Tensor) -> Tensor:
    """The features as the head sees them without a label: behind the mechanism, if that acts at inference (ICNN)."""
    timm_model: Any = model  # its methods are not in nn.Module's type
    features: Tensor = timm_model.forward_features(images)
    mechanism = getattr(model, "mechanism", None)
    if getattr(mechanism, "acts_without_targets", False):
        features = timm_model.mechanism(features)
    return features


def seen_maps(model: nn.Module, images: Tensor) -> Tensor:
    """The same as maps [batch, filters, height, width], whatever their layout.

    Raises:
        ValueError: If the features are no map.
    """
    features = seen_features(model, images)
    if features.ndim != 4:
        raise ValueError(
            f"{type(model).__name__} has tokens instead of a feature map, so its filters have no location in the "
            "image; use a model with a feature map (see find_stage(model).layout)."
        )
    return features.permute(0, 3, 1, 2) if is_channels_last(model) else features


class _FakeCopies(TorchFunctionMode):
    """Copies tensors as fake ones, wherever a module keeps them: a cache, a pruned weight, what a hook left behind."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), self.fake.from_tensor(tensor.detach()))


class _SignTracker(TorchDispatchMode):
    """Remembers which tensors cannot hold negative values, from the operations that made them."""

    # fmt: off
    makes_non_negative = frozenset([
        "relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "exp", "abs", "softplus",
        "_softmax", "zeros", "zeros_like", "ones",
    ])
    clamps = frozenset(["hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_"])
    arithmetic = frozenset(["add", "add_", "mul", "mul_", "div", "div_"])
    keeps_non_negative = arithmetic | frozenset([
        "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "slice", "select",
        "index", "cat", "stack", "split", "split_with_sizes", "unbind", "clone", "contiguous", "_to_copy", "detach",
        "alias", "squeeze", "unsqueeze", "flatten", "roll", "constant_pad_nd", "max_pool2d", "max_pool2d_with_indices",
        "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax", "maximum",
        "upsample_nearest2d", "upsample_bilinear2d", "pixel_shuffle", "pixel_unshuffle", "dropout", "native_dropout",
        "native_channel_shuffle", "channel_shuffle", "copy_", "lift_fresh",
    ])
    # fmt: on

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.non_negative: dict[int, Tensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self.non_negative

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._result_is_non_negative(func.overloadpacket.__name__, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                # Kept alive, so that no later tensor gets the same id.
                self.non_negative.pop(id(tensor), None) if not known else self.non_negative.update({id(tensor): tensor})
        return result

    def _result_is_non_negative(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in self.makes_non_negative:
            return True
        if name in self.clamps:
            low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
            return isinstance(low, (int, float)) and low >= 0
        if name not in self.keeps_non_negative:
            return False
        flat = chain.from_iterable(arg if isinstance(arg, (tuple, list)) else (arg,) for arg in args)
        values = list(flat)
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        # Outside arithmetic, an int is a dimension or a size.
        numbers = (int, float) if name in self.arithmetic else (float,)
        scalars = [value for value in (*values, *kwargs.values()) if isinstance(value, numbers)]
        return all(tensor in self for tensor in tensors) and all(scalar >= 0 for scalar in scalars)
