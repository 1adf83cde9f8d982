"""What ``TrainingMixin.attach`` does to an optimizer: it checks that the two belong together, and stands by its steps.

Nothing here computes a loss. A gate that never learns gives no error by itself: the standard path trains on without it.
So everything that leaves it out is looked for, before the first step and at every gated one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

_logger = logging.getLogger(__name__)
_attachments: WeakKeyDictionary[Optimizer, list[Attachment]] = WeakKeyDictionary()
_MAKE = "torch.optim.SGD(timm_csg.param_groups(model, lr=...))"


class Attachment:
    """The hooks of one loop on the optimizers of one model, and on the averages of that model.

    Args:
        loop: A ``TrainingMixin``.
        model: As given to ``attach``, wrapped or not; ``loop.after_step`` gets it after every step.
        inner: The differentiated model inside.
        optimizers: Without accelerate's wrappers, checked.
        averages: EMA or SWA copies.
    """

    def __init__(
        self, loop: Any, model: nn.Module, inner: Any, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module]
    ) -> None:
        self.loop, self.model, self.inner, self.mechanism = loop, model, inner, inner.mechanism
        self.is_in_step = False
        moved = _held(optimizers)
        counted = next((id(parameter) for parameter in inner.parameters() if id(parameter) in moved), None)
        self._handles: list[Any] = [_ProjectedUpdate(average) for average in averages]
        for optimizer in optimizers:
            held = _held([optimizer])
            self._hook(
                optimizer, counts=counted is None or counted in held, learns=bool(held & _ids(own_parameters(inner)))
            )

    def _hook(self, optimizer: Optimizer, *, counts: bool, learns: bool) -> None:
        """Register the hooks; ``counts``: its steps are the loop's; ``learns``: it moves the mechanism."""
        known = _attachments.setdefault(optimizer, [])
        for other in [other for other in known if other.inner is self.inner]:
            _logger.info("this optimizer was attached before; the new attachment takes the place of the old one")
            other.remove()
        had_gradient = False

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal had_gradient
            self._check_mechanism()
            if self.loop.path == "standard":
                for parameter in self.mechanism.parameters():
                    parameter.grad = None
            had_gradient = _has_gradient(self.mechanism)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if learns and not had_gradient:
                check_gradient(self.loop, self.inner)
            if not counts:
                self.inner.project_()
                return
            self.is_in_step = True
            try:
                self.loop.after_step(self.model)
            finally:
                self.is_in_step = False

        if not getattr(type(optimizer).step, "hooked", False):
            optimizer._patch_step_function()  # Lookahead skips the constructor, and with it the part that runs hooks
        self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        known.append(self)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        for known in _attachments.values():
            if self in known:
                known.remove(self)

    def _check_mechanism(self) -> None:
        if getattr(self.inner, "mechanism", None) is not self.mechanism:
            raise ValueError(
                "the model's mechanism was replaced (reset_classifier, undifferentiate) after its optimizer was "
                f"attached, which holds the old one; make a new optimizer, {_MAKE}, and attach that."
            )


def attachments_of(loop: Any, inner: Any) -> list[Attachment]:
    """Those of a loop and a differentiated model whose optimizers are alive."""
    every = (attachment for known in list(_attachments.values()) for attachment in known)
    return [attachment for attachment in every if attachment.loop is loop and attachment.inner is inner]


def check_by_hand(loop: Any, inner: Any) -> None:
    """Check a call of ``after_step``, unless it comes from an attachment, which has checked already.

    Raises:
        ValueError: If an optimizer is attached, too; or as ``check_gradient``.
    """
    own = attachments_of(loop, inner)
    if any(attachment.is_in_step for attachment in own):
        return
    if own:
        raise ValueError(
            "after_step() was called by hand, but an optimizer of this model is attached, which calls it after every "
            "step: each step would count twice. Leave out this call, or remove() what attach() returned."
        )
    check_gradient(loop, inner)


def check_gradient(loop: Any, inner: Any) -> None:
    """Check after a step that the mechanism has a gradient if the schedule asked for the gated path.

    Where no parameter at all has one nothing can be said: ``zero_grad()`` came first, or a host steps without training
    (Lightning's ``StochasticWeightAveraging`` does, to bring batch norms up to date).

    Raises:
        ValueError: If it has none, with the most likely reason.
    """
    path, mechanism = loop.path, inner.mechanism
    trains = any(isinstance(weight, Tensor) or weight for weight in mechanism.loss_weights().values())
    if (
        path == "standard"
        or not trains
        or not own_parameters(inner)
        or _has_gradient(mechanism)
        or not _has_gradient(inner)
    ):
        return
    asked = f"the schedule asks for path {path!r} (epoch {loop.progress.epoch}, step {loop.progress.step})"
    if not inner.training:
        raise ValueError(
            f"{asked}, but the model is in eval mode, in which only the standard path runs; call model.train() "
            "before every epoch, and .eval() on single layers (BatchNorm) that shall not change."
        )
    raise ValueError(
        f"{asked}, but no gradient reached {', '.join(own_parameters(inner))}; back-propagate "
        "loop.losses(model, images, targets, criterion)['loss'], since criterion(model(images), targets) is the "
        "standard path alone."
    )


def bare_optimizers(given: Any) -> list[Optimizer]:
    """One optimizer or several as a list, without accelerate's or Lightning's wrappers.

    Raises:
        TypeError: If there is something else.
    """
    bare = []
    for optimizer in given if isinstance(given, (list, tuple)) else [given]:
        inner = optimizer
        while hasattr(inner, "param_groups") and isinstance(getattr(inner, "optimizer", None), Optimizer):
            inner = inner.optimizer
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"attach() takes an optimizer and the model, in this order, but found {type(inner).__name__} for the "
                "optimizer."
            )
        bare.append(inner)
    return bare


def check_optimizers(optimizers: Sequence[Optimizer], inner: Any, *, frozen: bool) -> None:
    """Check that the optimizers move all of the mechanism, and the classifier that the model has now.

    Raises:
        ValueError: If they lack one of these parameters, or the mechanism is frozen and ``frozen`` does not say so.
    """
    every, own = dict(inner.mechanism.named_parameters(prefix="mechanism")), own_parameters(inner)
    if every and not own and not frozen:
        raise ValueError(
            f"{', '.join(every)} {'is' if len(every) == 1 else 'are'} frozen and would never learn; call "
            "model.mechanism.requires_grad_(True) before making the optimizer (peft freezes whatever it does not "
            "adapt), or attach(..., frozen=True) if it shall stay as it is."
        )
    held, known = _held(optimizers), _ids(dict(inner.named_parameters()))
    missing = [name for name, parameter in own.items() if id(parameter) not in held]
    if held - known:  # parameters that the model no longer has: was the classifier replaced?
        head = inner.get_classifier()
        heads = nn.ModuleList(head if isinstance(head, (tuple, list)) else [head])
        classifier = {id(parameter) for parameter in heads.parameters() if parameter.requires_grad} - held
        missing += [name for name, parameter in inner.named_parameters() if id(parameter) in classifier]
    if missing:
        raise ValueError(
            f"the optimizer lacks {', '.join(missing)}, which would never learn; make it after differentiate() and "
            f"reset_classifier(): {_MAKE}. Optimizers that share the work are attached together, "
            "attach([first, second], model)."
        )
    _warn_of_decay(optimizers, own)


def check_replicas(model: Any, inner: Any) -> None:
    """Raise if DistributedDataParallel was wrapped around the model before its mechanism was there.

    Raises:
        ValueError: With the order that works.
    """
    while model is not inner and not isinstance(model, DistributedDataParallel):
        model = getattr(model, "module", getattr(model, "_orig_mod", inner))
    if isinstance(model, DistributedDataParallel) and _ids(own_parameters(inner)) - {
        id(p) for p in model._module_parameters
    }:
        raise ValueError(
            "DistributedDataParallel was made before differentiate() or reset_classifier() and does not know the "
            "mechanism, so that the gates of the processes would drift apart; wrap the model afterwards."
        )


class _ProjectedUpdate:
    """In the place of an average's update method: updates, then projects, since an average of gates may peak below 1.

    An attribute of the average that can be copied and pickled with it; the handle of its own removal.
    """

    def __init__(self, average: nn.Module) -> None:
        self.average = average
        names = [name for name in ("update_parameters", "update") if callable(getattr(type(average), name, None))]
        self.inner: Any = unwrap_model(average)
        if not names or not hasattr(self.inner, "project_"):
            raise TypeError(
                "averages must be copies that were made after differentiate(), such as timm.utils.ModelEmaV3(model) or "
                f"torch.optim.swa_utils.AveragedModel(model), but found {type(average).__name__} of "
                f"{type(self.inner).__name__}."
            )
        self.name = names[0]
        setattr(average, self.name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        getattr(type(self.average), self.name)(self.average, *args, **kwargs)
        self.inner.project_()

    def remove(self) -> None:
        """Give the average its own method back."""
        if self.average.__dict__.get(self.name) is self:
            delattr(self.average, self.name)


def own_parameters(inner: Any) -> dict[str, nn.Parameter]:
    """The mechanism's parameters that learn, by name."""
    named = inner.mechanism.named_parameters(prefix="mechanism")
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _ids(parameters: dict[str, nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters.values()}


def _held(optimizers: Iterable[Optimizer]) -> set[int]:
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def _has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


def _warn_of_decay(optimizers: Iterable[Optimizer], own: dict[str, nn.Parameter]) -> None:
    ids = _ids(own)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if group.get("weight_decay") and any(id(parameter) in ids for parameter in group["params"]):
            _logger.warning(
                "the optimizer applies weight_decay=%g to the mechanism's parameters, which pulls gates to 0; build "
                "its groups with timm_csg.param_groups(model, ...) or timm's create_optimizer_v2",
                group["weight_decay"],
            )
