"""The tensors of a model under plain timm's keys, whatever training tools have done to its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

COUNTER = "num_batches_tracked"
# Parts of keys, and what to do about a model whose state dict has such keys.
_UNDO = (
    ("lora_", "it holds a LoRA adapter: call merge_and_unload() of the peft model first"),
    ("base_layer", "it holds an adapter: call merge_and_unload() of the peft model first"),
    ("_packed_params", "it is quantised: save it before quantising, and quantise again after loading"),
    ("_flat_param", "FullyShardedDataParallel has sharded it: use fully_shard (FSDP2), whose models can be saved"),
    (
        "",
        "save it before what changes its layers (reparameterize_model, fused layers, adapters, quantisation), and do "
        "that again after loading; torch.save(model.state_dict(), ...) keeps the tensors as they are",
    ),
)


class Header(NamedTuple):
    """What a file records of a tensor: its shape, and ``"F"`` float, ``"C"`` complex or ``"I"`` integer."""

    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, tensor: Tensor) -> Header:
        """That of a tensor in memory."""
        return cls(tuple(tensor.shape), "C" if tensor.is_complex() else "F" if tensor.is_floating_point() else "I")


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, each tensor as the forward pass uses it, under the key that a plain module has.

    Merged are ``torch.nn.utils.parametrize`` (weight_norm, orthogonal, ...), the older weight_norm and spectral_norm,
    pruning masks, compiled submodules, and the shards of ``fully_shard`` (FSDP2). The last is a collective operation:
    every process has to call this, and all get whole tensors.

    Args:
        model: Any module; left as it is.

    Returns:
        Contiguous tensors, each in memory of its own.

    Raises:
        ValueError: If an entry is not a plain tensor, such as a quantised one.
    """
    state = dict(model.state_dict())
    with torch.no_grad():
        for prefix, module in model.named_modules(remove_duplicate=False):
            path = f"{prefix}." if prefix else ""
            for name, value, parts in _computed(module):
                for key in [key for key in state if key.startswith(tuple(path + part for part in parts))]:
                    del state[key]
                state[path + name] = value
    return {key.replace("_orig_mod.", ""): _plain_tensor(key, value) for key, value in state.items()}


def _computed(module: nn.Module) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Tensors that a module computes from others before each forward: name, value, and how the others' keys begin."""
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            training = chain.training
            chain.eval()  # spectral_norm takes a step of its power method otherwise
            yield name, chain(), (f"parametrizations.{name}.",)
            chain.train(training)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            yield name, hook.apply_mask(module), (f"{name}_orig", f"{name}_mask")
        elif isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight(module), (f"{hook.name}_g", f"{hook.name}_v")
        elif isinstance(hook, SpectralNorm):
            value = hook.compute_weight(module, do_power_iteration=False)
            yield hook.name, value, (f"{hook.name}_orig", f"{hook.name}_u", f"{hook.name}_v")


def _plain_tensor(key: str, value: object) -> Tensor:
    if hasattr(value, "full_tensor"):  # a shard of fully_shard
        value = value.full_tensor()
    value = value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(f"the model cannot be saved, {key} has no values yet (it is on the device 'meta').")
    if type(value) is not Tensor or value.is_quantized:
        kind = "quantised tensor" if isinstance(value, Tensor) and value.is_quantized else type(value).__name__
        raise ValueError(f"the model cannot be saved, {key} is a {kind}, not a plain tensor; {remedy([key])}.")
    return value.to("cpu", copy=True).contiguous()


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise if a tensor that is to be saved holds NaN or infinity.

    Raises:
        ValueError: With its key.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{bad[0]} is not finite, so the checkpoint would be of no use; training diverged: save an earlier state, "
            "and train with a lower learning rate."
        )


def remedy(keys: Iterable[str]) -> str:
    """What to do about a model whose state dict has entries that plain timm's lacks.

    Example:
        >>> remedy(["fc.lora_A.default.weight"])
        'it holds a LoRA adapter: call merge_and_unload() of the peft model first'
    """
    keys = list(keys)
    return next(advice for part, advice in _UNDO if any(part in key for key in keys))


def with_counters(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in which batch norms have their counters as integers, also frozen and averaged ones, which lose them."""
    result = {key: value for key, value in state.items() if key in expected}
    for key, like in expected.items():
        if key.endswith(COUNTER):
            found = state.get(key, torch.zeros_like(like, device="cpu"))
            result[key] = found.to(like.dtype) if found.shape == like.shape else found
    return result | {key: value for key, value in state.items() if key not in expected}


def misfits(found: Mapping[str, Header], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being loaded into a model: keys that are missing or unexpected, shapes, kinds of numbers.

    Args:
        found: What a file or state dict has, by key.
        expected: The state dict of the model.

    Returns:
        One phrase for each problem; empty if the tensors fit.

    Example:
        >>> misfits({"bias": Header((3,), "F")}, {"weight": torch.ones(1), "bias": torch.ones(2)})
        ['missing weight', 'bias has shape [3] instead of [2]']
    """
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in expected]
    problems += [
        f"{key} has shape {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != tuple(value.shape)
    ]
    problems += [
        f"{key} holds another kind of number than {value.dtype}"
        for key, value in expected.items()
        if key in found and found[key].kind != Header.of(value).kind
    ]
    return problems
