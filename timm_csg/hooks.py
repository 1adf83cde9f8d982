"""What acts on a module's calls besides its class: its mode, and hooks that somebody has put on it.

Whether a hook changes anything can only be seen by running it. So where there are hooks, and only there, a call is
compared with what the module computes by itself, once for each set of hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

Hooks = tuple[tuple[int, ...], ...]
_known: WeakKeyDictionary[nn.Module, tuple[Hooks, bool]] = WeakKeyDictionary()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def hooks_on(modules: Iterable[Any]) -> Hooks:
    """What acts on the calls of some modules: the numbers that torch gave their forward hooks, never given twice.

    Torch's own are left out, which gather parameters (``fully_shard``) or compute them (pruning, the older norms).

    Example:
        >>> layer = nn.ReLU()
        >>> handle = layer.register_forward_hook(lambda module, inputs, output: None)
        >>> len(hooks_on([layer])[0]), handle.remove(), hooks_on([layer])
        (1, None, ())
    """
    found = []
    for module in modules:
        own = (getattr(module, name, {}).items() for name in ("_forward_pre_hooks", "_forward_hooks"))
        numbers = tuple(number for number, hook in chain(*own) if not _is_of_torch(hook))
        if "forward" in getattr(module, "__dict__", ()):  # put on the instance, as accelerate does
            numbers = (*numbers, id(module.forward))
        if numbers:
            found.append(numbers)
    return tuple(found)


def hint(model: nn.Module) -> str:
    """A sentence, with a space before it, that names the modules with hooks; empty where there are none."""
    names = [name or "the model" for name, module in model.named_modules() if hooks_on([module])]
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" Forward hooks are on {', '.join(names[:3])}{more}; if one changes an output, remove() it."


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("torch.distributed.", "torch.nn.utils."))


def changes_layer(layer: Any) -> bool:
    """Whether hooks of a linear layer, or a ``forward`` put on it, make anything else than its class does."""
    if not hooks_on([layer]):  # else the weight is not even read: a parametrized one may take a step by that
        return False
    with in_eval_mode(layer):
        weight = layer.weight
    if weight.is_meta or hasattr(weight, "full_tensor"):  # nothing, or a part, to compute with
        return False
    inputs = torch.rand(2, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    given = inputs[:, :, None, None] if isinstance(layer, nn.Conv2d) else inputs
    return _compared(layer, lambda: not _same(layer(given), type(layer).forward(layer, given)))


def check_hooks(model: Any) -> None:
    """Raise if a hook on the model itself changes what it returns: who asks its stage and its head passes by it.

    Args:
        model: A timm classifier. Hooks on its modules are no matter: they run whoever asks.

    Raises:
        ValueError: With what to do.
    """
    if _changes_model(model):
        raise ValueError(
            f"a forward hook on {type(model).__name__} changes what model(images) returns, but this asks the model's "
            "stage and its head one by one, which the hook does not see; remove() what register_forward_hook returned, "
            "or hook the layer that it is about: a hook on model.get_classifier() is seen."
        )


def check_saved(model: Any, classifier: Any) -> None:
    """Raise if a hook on the model or its classifier changes the logits, which a saved model would then lack.

    Raises:
        ValueError: With what to do.
    """
    is_layer = isinstance(classifier, (nn.Linear, nn.Conv2d))
    if (is_layer and changes_layer(classifier)) or _changes_model(model):
        raise ValueError(
            f"a forward hook changes the logits of {type(model).__name__}, but files hold weights and no hooks; "
            "remove() what register_forward_hook returned, and save."
        )


def _changes_model(model: Any) -> bool:
    if not (model._forward_pre_hooks or model._forward_hooks) or not hasattr(model, "forward_head"):
        return False
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if like.is_meta or hasattr(like, "full_tensor"):
        return False

    def differs() -> bool:
        size = get_model_input_config(model)["input_size"]
        images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
        return not _same(model(images), model.forward_head(model.forward_features(images)))

    return _compared(model, differs)


def _compared(module: nn.Module, differs: Callable[[], bool]) -> bool:
    """What a comparison finds, remembered as long as the hooks are the same; modes and random state stay as found."""
    hooks = hooks_on([module])
    known = _known.get(module)
    if known is None or known[0] != hooks:
        devices = list({parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"})
        with in_eval_mode(module), torch.no_grad(), torch.random.fork_rng(devices):
            known = _known[module] = hooks, differs()
    return known[1]


def _same(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.numel() != expected.numel():
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    distance = (found.flatten() - expected.flatten()).nan_to_num().abs().max()
    return bool(distance <= tolerance * (expected.nan_to_num().abs().max() + 1e-6))
