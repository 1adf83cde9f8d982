"""What a timm model becomes by ``differentiate``: itself, with a mechanism between its last stage and its head.

The model keeps its identity: its class becomes a subclass of its own class (as ``torch.nn.utils.parametrize`` and
``fully_shard`` do it), one submodule ``model.mechanism`` is added, and only ``forward_head`` and ``forward`` change.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeGuard

from torch import Tensor, nn

from timm_csg.checks import whole
from timm_csg.first_batch import check_kind
from timm_csg.head import HeadTraits, check_shape, effective_weight, find_classifier, is_plain_layer, probe_traits
from timm_csg.hooks import Hooks, hooks_on
from timm_csg.mechanisms.base import Head, HeadKind, Mechanism, MechanismConfig
from timm_csg.mechanisms.targets import check_targets
from timm_csg.stage import is_channels_last

_logger = logging.getLogger(__name__)
_PATHS = ("standard", "gated")


class PathOutputs(NamedTuple):
    """What ``model(images, targets, paths=...)`` returns.

    Attributes:
        standard: Logits [batch, classes] of the standard path, None if it was not asked for.
        gated: Logits [batch, classes] of the gated path, None if it was not asked for; the same tensor as ``standard``
            for mechanisms whose paths do not differ (ICNN).
        losses: The mechanism's own loss terms, unweighted scalars by name; empty unless the gated path was asked for.
    """

    standard: Tensor | None
    gated: Tensor | None
    losses: dict[str, Tensor]


class DifferentiatedModel(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """What a model is an instance of after ``differentiate``, besides its own timm class.

    ``model(images)`` is timm's own forward. ``model(images, targets)`` returns the gated path's logits.
    ``model(images, targets, paths=("standard", "gated"))`` returns ``PathOutputs`` from one backbone pass.
    """

    mechanism: Mechanism
    _plain_class: ClassVar[type[nn.Module]]
    _features_name: ClassVar[str]
    _probed: tuple[Any, HeadTraits, Hooks] | None = None
    holds_frozen: bool = False
    """Whether ``train()`` leaves frozen batch norms in eval mode, see ``timm_csg.freeze``."""

    # paths is not keyword-only: torch.onnx.export(dynamo=False) passes defaults by position.
    def forward(
        self, x: Tensor, targets: Tensor | None = None, paths: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor | PathOutputs:
        """Logits, or ``PathOutputs`` if ``paths`` is given.

        Args:
            x: Images [batch, channels, height, width]; without targets also what else the timm model takes.
            targets: Class indices [batch], soft or multi-hot targets [batch, classes], or None.
            paths: Any of ``"standard"`` and ``"gated"``. Targets may be left out for mechanisms that need none.
            **kwargs: What the timm model's own forward takes besides images.

        Returns:
            Logits [batch, classes]; or those of both paths and the mechanism's losses, as far as asked for.

        Raises:
            ValueError: If a path is unknown, there is not one target for each image, the gated path is asked for
                without the targets it needs, or the head gives no logits [batch, classes].
            TypeError: If the gated path is asked for with a NaFlex patch dictionary, or ``patch_coord`` is not named.
        """
        check_kind(x)
        check_targets(x, targets, paths)
        if targets is None and paths is None:
            return super().forward(x, **kwargs)  # type: ignore[no-any-return]
        if paths is not None and (isinstance(paths, str) or not paths or any(path not in _PATHS for path in paths)):
            raise ValueError(f"paths must name one or both of {_PATHS}, but are {paths!r}.")
        if paths is not None and "gated" not in paths:
            standard = super().forward(x, **kwargs)
            check_shape(standard, self)
            return PathOutputs(standard, None, {})
        _check_one_tensor(x)
        features = self.forward_features(x, **kwargs)
        if paths is None:
            return self.forward_head(features, targets=targets)
        standard = self._plain_logits(features) if "standard" in paths else None
        head = self.read_head()
        is_known = standard is not None and not self.mechanism.paths_differ
        gated = standard if is_known else self._gated_logits(features, targets, head)
        return PathOutputs(standard, gated, self.mechanism.losses(features, targets, head))

    def forward_head(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Timm's ``forward_head``, seen through the mechanism if there are targets or it needs none at inference."""
        if not args and self._features_name in kwargs:  # NaFlexViT passes its features by name
            args = (kwargs.pop(self._features_name),)
        features, *others = args
        if targets is not None and not others and not kwargs:
            return self._gated_logits(features, targets, self.read_head())
        if targets is not None or self.mechanism.acts_without_targets:
            features = self.mechanism(features, targets)
        logits: Tensor = super().forward_head(features, *others, **kwargs)
        return logits

    def _plain_logits(self, features: Tensor) -> Tensor:
        """The standard path's logits [batch, classes]; the mechanism acts where it needs no targets."""
        logits = self.forward_head(features)
        check_shape(logits, self)
        return logits

    def _gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        _check_one_tensor(features)
        if targets is None and self.mechanism.needs_targets:
            raise ValueError(
                f"the gated path of mechanism {self.mechanism.name!r} needs targets here: call model(images, targets), "
                "or use mechanism='assigned', which needs none."
            )
        return self.mechanism.gated_logits(features, targets, head)

    def read_head(self) -> Head:
        """The model's own head, as the mechanism sees it; its kind is only looked up for mechanisms that read it."""
        plain_head = super().forward_head
        traits = self._probe() if self.mechanism.reads_head else HeadTraits("map")
        classifier = find_classifier(self) if traits.kind in ("linear", "normed") else None
        weight, bias = (None, None) if classifier is None else effective_weight(classifier)

        def logits(features: Tensor) -> Tensor:
            found: Tensor = plain_head(features)
            check_shape(found, self)
            return found

        return Head(
            kind=traits.kind,
            logits=logits,
            pooled=functools.partial(plain_head, pre_logits=True),
            weight=weight,
            bias=bias,
            pools_by_mean=traits.pools_by_mean,
            is_plain=classifier is None or is_plain_layer(classifier),
        )

    def _probe(self) -> HeadTraits:
        """Probe the head once for every classifier layer and every set of hooks on the head, on a small random map."""
        classifier, known = find_classifier(self), self._probed
        if known is None or known[0] != classifier or known[2] != hooks_on(known[1].modules):  # two heads are a tuple
            num_filters = self.mechanism.num_filters
            with plain(self):
                traits = probe_traits(self, num_filters)
            if next(self.parameters()).is_meta:
                return traits  # cannot be probed yet; "map" is right for every head, only slower
            self._probed = known = (classifier, traits, hooks_on(traits.modules))
        return known[1]

    @property
    def head_kind(self) -> HeadKind:
        """How the logits depend on the map, see ``mechanisms.Head``."""
        return self._probe().kind

    def project_(self) -> None:
        """Bring the mechanism's parameters, and what it masks in the classifier, back into their feasible set."""
        self.mechanism.project_(self.read_head())

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Timm's ``reset_classifier``; the mechanism is re-created with it, since its classes change.

        Raises:
            ValueError: If ``num_classes`` is 0, so that there is nothing to differentiate, or does not suit the
                mechanism's config.
        """
        classes = whole(num_classes) or 0
        if classes < 1:
            raise ValueError(
                f"a differentiated model needs classes, but num_classes={num_classes}; undifferentiate() first."
            )
        made = make_mechanism(self, classes, type(self.mechanism), self.mechanism.config)
        super().reset_classifier(classes, *args, **kwargs)
        self.mechanism = made
        self._probed = None
        probe_in_advance(self)
        _logger.info("classifier and mechanism %s re-created for %d classes", self.mechanism.name, classes)

    def train(self, mode: bool = True) -> Any:
        """As ``torch.nn.Module.train``, but batch norms that ``timm_csg.freeze`` froze stay in eval mode."""
        super().train(mode)
        if mode and self.holds_frozen:
            hold_frozen(self)
        return self

    def no_weight_decay(self) -> set[str]:
        """Timm's own names and the mechanism's, so that optimizers leave the gate undecayed."""
        plain_names = super().no_weight_decay() if hasattr(super(), "no_weight_decay") else ()
        return {*plain_names, *(f"mechanism.{name}" for name in self.mechanism.no_weight_decay())}

    def _get_name(self) -> str:
        return f"Differentiated{self._plain_class.__name__}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_instance, (self._plain_class,), self.__getstate__()


def _check_one_tensor(images_or_features: Any) -> None:
    if not isinstance(images_or_features, Tensor):
        raise TypeError(
            "the gated path needs images [batch, channels, height, width] that give one tensor of features, but found "
            f"a {type(images_or_features).__name__}; NaFlex patch dictionaries go through the standard path only, "
            "model(patches)."
        )


@functools.cache
def differentiated_class(plain_class: Any) -> type[DifferentiatedModel]:
    """The class that instances of a timm class get, made once."""
    namespace = {
        "_plain_class": plain_class,
        "_features_name": list(inspect.signature(plain_class.forward_head).parameters)[1],
        "__doc__": plain_class.__doc__,
        "__module__": plain_class.__module__,
    }
    # The name is timm's, since timm writes it into checkpoints; repr() says that the model is differentiated.
    return type(plain_class.__name__, (DifferentiatedModel, plain_class), namespace)


def _new_instance(plain_class: Any) -> DifferentiatedModel:
    """Rebuild an instance when copying or unpickling; the class itself is made on the fly and cannot be looked up."""
    made = differentiated_class(plain_class)
    return made.__new__(made)


def make_mechanism(
    model: Any, num_classes: int, mechanism_class: type[Mechanism], config: MechanismConfig
) -> Mechanism:
    """A mechanism for a model: its filters and layout, on its device, in its dtype and mode."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with like.device:
        made = mechanism_class(model.num_features, num_classes, config, channels_last=is_channels_last(model))
    return made.to(device=like.device, dtype=like.dtype).train(model.training)


def hold_frozen(model: nn.Module) -> None:
    """Put batch norms whose parameters are all frozen in eval mode, so that their statistics stay as well."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def is_differentiated(model: nn.Module) -> TypeGuard[DifferentiatedModel]:
    """Whether ``differentiate`` has been applied to this model.

    Args:
        model: Any module.

    Returns:
        Whether it has a mechanism; type checkers then know it as a ``DifferentiatedModel``.
    """
    return isinstance(model, DifferentiatedModel)


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Borrow the plain timm view of a model: timm's class and keys inside the block, the mechanism back afterwards.

    For tools that look at the class or the keys: TorchScript, FX, timm's own writers.

    Args:
        model: A model; one that is not differentiated passes through.

    Yields:
        The same object.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet"))
        >>> with plain(model) as borrowed:
        ...     "mechanism.owned" in borrowed.state_dict()
        False
    """
    if not isinstance(model, DifferentiatedModel):
        yield model
        return
    mechanism, own_class = model.mechanism, type(model)
    lent: Any = model
    del lent._modules["mechanism"]
    lent.__class__ = model._plain_class
    try:
        yield lent
    finally:
        lent.__class__ = own_class
        model._modules["mechanism"] = mechanism


def probe_in_advance(model: DifferentiatedModel) -> None:
    """Probe the head outside of any compiled call, for the mechanisms that look into it."""
    if model.mechanism.reads_head:
        _ = model.head_kind
