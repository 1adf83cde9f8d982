"""The edges of receptive fields, sent through a model instead of an image; for receptive_field.py.

What travels are four numbers for each position: the first row and column it depends on, and minus the last ones; so
"depends on all of these" is a minimum, for windows (convolution, pooling), branches (residual sums) and channels alike.
Borders are extrapolated and not padded with zeros, so that fields may reach beyond the image and a centre is not pushed
inwards. No weight has a say, and no model is named here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_edges(height: int, width: int, channels: int) -> Tensor:
    """What each pixel of an image depends on: itself, [4, channels, height, width]."""
    row, column = torch.arange(height, device="cpu").float()[:, None], torch.arange(width, device="cpu").float()
    edges = [row.expand(height, width), -row.expand(height, width) - 1]
    edges += [column.expand(height, width), -column.expand(height, width) - 1]
    return torch.stack(edges)[:, None].repeat(1, channels, 1, 1)


class NotLocalError(Exception):
    """An operation mixes positions in a way that has no window."""


class Edges(Tensor):
    """A tensor of edges; every operation that it meets acts on the edges as that operation's dependencies do."""

    value: Tensor

    @staticmethod
    def __new__(cls: Any, value: Tensor) -> Edges:
        made: Edges = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), dtype=value.dtype, device=value.device
        )
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        handler = _HANDLERS.get(name.removesuffix("_"))
        if handler is None and name not in _MOVES:
            raise NotLocalError(name)
        plain = _unwrapped(args)
        if handler is None and name in ("view", "_unsafe_view"):
            handler = torch.reshape  # the edges need not lie in memory as the values would
        result = func(*plain, **(kwargs or {})) if handler is None else handler(*plain, **_options(kwargs or {}))
        if name.endswith("_") and isinstance(args[0], Edges):
            args[0].value = result
            return args[0]
        return _wrapped(result)


def _unwrapped(values: Any) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_unwrapped(value) for value in values)
    return values.value if isinstance(values, Edges) else values


def _wrapped(values: Any) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_wrapped(value) for value in values)
    return Edges(values) if isinstance(values, Tensor) else values


def _options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("dtype", "alpha", "memory_format")}


def _extrapolated(edges: Tensor, padding: Sequence[int]) -> Tensor:
    """Continue edges beyond the borders; padding as in ``torch.nn.functional.pad``, negative values crop."""
    for pair in range(len(padding) // 2):
        dim, (before, after) = edges.ndim - 1 - pair, padding[2 * pair : 2 * pair + 2]
        length = edges.shape[dim]
        if (before > 0 or after > 0) and length < 2:
            raise NotLocalError("the border of a map of one position")
        index = torch.arange(-before, length + after, device=edges.device)
        inside = index.clamp(0, length - 1)
        beyond = (index - inside).view(-1, *[1] * pair)
        step = edges.narrow(dim, 1, 1) - edges.narrow(dim, 0, 1) if length > 1 else 0
        edges = edges.index_select(dim, inside) + beyond * step
    return edges


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return int(values[0]), int(values[-1])


def _window(
    edges: Tensor, kernel: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """Minimum over each window of a convolution or pooling."""
    channels = edges.shape[1]
    if edges.stride(1) == 0:  # the channels of an ordinary convolution all depend on the same
        edges = edges[:, :1]
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = _pair(stride) if stride not in ([], ()) else kernel
    sides = []
    for length, k, s, p, d in zip(edges.shape[2:], kernel, stride, padding, dilation, strict=True):
        reach = d * (k - 1) + 1
        steps = (length + 2 * p - reach) / s
        count = math.floor(steps) + 1
        if ceil_mode and math.ceil(steps) * s < length + p:  # a last window must start inside the image
            count = math.ceil(steps) + 1
        sides.append([p, (count - 1) * s + reach - length - p])
    lowest: Tensor = -F.max_pool2d(-_extrapolated(edges, sides[1] + sides[0]), kernel, stride, dilation=dilation)
    return lowest.expand(-1, channels, -1, -1)


def _convolution(
    edges: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    if transposed or weight.ndim != 4:
        raise NotLocalError("transposed or not two-dimensional convolution")
    batch, channels = edges.shape[:2]
    size = (batch, weight.shape[0], -1, -1)
    if edges.stride(1) == 0 or groups == 1:
        return _window(edges.amin(dim=1, keepdim=True), weight.shape[2:], stride, padding, dilation).expand(size)
    grouped = edges.reshape(batch, groups, channels // groups, *edges.shape[2:]).amin(dim=2)
    grouped = _window(grouped, weight.shape[2:], stride, padding, dilation)
    return grouped.repeat_interleave(weight.shape[0] // groups, dim=1)


def _product(left: Any, right: Any, *unused: Any, **options: Any) -> Tensor:
    """A matrix product along the last dimension with weights; with other edges it would be attention."""
    if right.ndim != 2:
        raise NotLocalError("product of activations")
    lowest: Tensor = left.amin(dim=-1, keepdim=True)
    return lowest.expand(*left.shape[:-1], right.shape[1])


def _joined(left: Any, right: Any, *unused: Any, **options: Any) -> Tensor:
    """A sum, product, ... of two branches depends on what either does; constants and global values are ignored."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return left if isinstance(left, Tensor) else right
    shape = torch.broadcast_shapes(left.shape, right.shape)
    if _is_global(right, shape):
        return left.expand(shape)
    if _is_global(left, shape):
        return right.expand(shape)
    if left.ndim == right.ndim == 4 and left.stride(1) == right.stride(1) == 0:
        return torch.minimum(left[:, :1], right[:, :1]).expand(shape)
    return torch.minimum(left, right)


def _is_global(edges: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor stretches over both dimensions of a map when it is broadcast to a shape."""
    own = [1] * (len(shape) - edges.ndim) + list(edges.shape)
    return sum(length == 1 < target for length, target in zip(own, shape, strict=True)) > 1


def _reduced(edges: Tensor, *args: Any, **options: Any) -> Tensor:
    dims = next((arg for arg in args if isinstance(arg, list)), options.get("dim"))
    keepdim = options.get("keepdim", any(arg is True for arg in args))
    return edges.amin(dim=list(range(edges.ndim)) if dims is None else dims, keepdim=keepdim)


def _resized(edges: Tensor, size: Any, *args: Any) -> Tensor:
    """Interpolated maps, as if the positions in between looked at the places in between."""
    for dim, length in zip((-2, -1), size, strict=True):
        before = edges.shape[dim]
        if before < 2:
            raise NotLocalError("interpolation of a map of one position")
        place = (torch.arange(length, device=edges.device) + 0.5) * (before / length) - 0.5
        first, step = edges.narrow(dim, 0, 1), edges.narrow(dim, 1, 1) - edges.narrow(dim, 0, 1)
        edges = first + step * (place[:, None] if dim == -2 else place)
    return edges


def _adaptive(edges: Tensor, size: Any) -> Tensor:
    if tuple(size) == tuple(edges.shape[2:]):
        return edges
    if max(size) > 1:
        raise NotLocalError("adaptive pooling to several positions")
    return edges.amin(dim=(2, 3), keepdim=True)


def _unchanged(edges: Tensor, *args: Any, **options: Any) -> Tensor:
    return edges


def _with_statistics(edges: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return edges, edges.new_zeros(()), edges.new_zeros(())


# Operations that only move values about.
# fmt: off
_MOVES = frozenset([
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "slice", "select",
    "cat", "stack", "split", "split_with_sizes", "unbind", "clone", "contiguous", "_to_copy", "detach", "alias",
    "squeeze", "unsqueeze", "flatten", "pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "channel_shuffle",
    "lift_fresh",
])
_PER_VALUE = [
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid",
    "tanh", "softplus", "clamp", "clamp_min", "clamp_max", "exp", "sqrt", "rsqrt", "square", "pow", "abs", "neg", "erf",
    "reciprocal", "log", "dropout", "prelu", "_prelu_kernel", "selu", "celu", "log_sigmoid", "threshold",
]
# fmt: on
_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_PER_VALUE, _unchanged),
    **dict.fromkeys(["add", "sub", "mul", "div", "maximum", "minimum", "rsub"], _joined),
    **dict.fromkeys(["mean", "sum", "amax", "var", "linalg_vector_norm"], _reduced),
    **dict.fromkeys(["_adaptive_avg_pool2d", "adaptive_avg_pool2d"], _adaptive),
    **dict.fromkeys(
        [
            "native_batch_norm",
            "cudnn_batch_norm",
            "_native_batch_norm_legit_no_training",
            "native_layer_norm",
            "native_group_norm",
        ],
        _with_statistics,
    ),
    **dict.fromkeys(["upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"], _resized),
    "addcmul": lambda edges, left, right, **options: _joined(_joined(left, right), edges),
    "_softmax": lambda edges, dim, *_: edges.amin(dim=dim, keepdim=True).expand_as(edges),
    "convolution": _convolution,
    "max_pool2d": _window,
    "max_pool2d_with_indices": lambda *args: (_window(*args), None),
    "avg_pool2d": lambda edges, kernel, stride=(), padding=0, ceil_mode=False, *rest: _window(
        edges, kernel, stride, padding, 1, ceil_mode
    ),
    **dict.fromkeys(
        ["constant_pad_nd", "reflection_pad2d", "replication_pad2d"], lambda x, pad, *_: _extrapolated(x, pad)
    ),
    "mm": _product,
    "addmm": lambda bias, left, right, **options: _product(left, right),
    "linear": lambda left, weight, bias=None: _product(left, weight.T),
}
