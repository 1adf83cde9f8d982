"""Train a differentiated model as a ``timm.task``: in your own loop, or in timm's unmodified ``train.py``.

``train.py`` makes its task, makes the optimizer from ``task.get_trainable_module()``, resumes, copies the EMA,
compiles, wraps; a step is forward, backward, ``optimizer.step()``, ``zero_grad()``, ``task.update_ema(step)``. It tells
the task neither the optimizer nor the epoch, so ``update_ema`` is where the gate is projected and the epoch is counted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_csg.assignment import Assignment
from timm_csg.attachment import Attachment, attachments_of
from timm_csg.checks import whole
from timm_csg.differentiation import differentiate
from timm_csg.manifest import CheckpointError, mechanism_config
from timm_csg.model import DifferentiatedModel, is_differentiated
from timm_csg.reading import MECHANISM_PREFIX, load_file
from timm_csg.schedule import Alternating, Joint
from timm_csg.training import TrainingMixin
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)


class DifferentiationTask(TrainingMixin, ClassificationTask):  # type: ignore[misc]  # timm has no types
    """timm's ``ClassificationTask`` with the paths, loss terms, projection and schedule of ``TrainingMixin``.

    Checkpoints keep ``state_dict`` and ``state_dict_ema`` exactly plain timm's; the mechanism, its options and the
    progress are in ``task_state`` and ``task_state_ema``. The EMA copy has a gate of its own, projected as well.

    Args:
        model: A differentiated model, not yet wrapped or compiled: the task does both.
        criterion: Called with (logits, targets), returns a scalar; None: timm makes one from ``criterion_kwargs``.
        schedule: None: the class's, which is ``Alternating()``.
        steps_per_epoch: Optimizer steps of an epoch, from which ``update_ema`` counts epochs; None: you call
            ``set_epoch``. Schedules by step, ``Joint()`` and mechanisms without epochs (CSG) need neither.
        **options: ``criterion_kwargs``, ``device``, ``dtype`` and ``verbose`` of ``ClassificationTask``.

    Raises:
        TypeError: If the model is not differentiated.
        ValueError: If ``steps_per_epoch`` is not a whole number, 1 or more.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet"), num_classes=2).train()
        >>> task = DifferentiationTask(model, schedule=Joint(), verbose=False)
        >>> optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.1), lr=0.1)
        >>> task(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))["loss"].backward()
        >>> optimizer.step()
        >>> task.update_ema()
        >>> task.progress.step, model.mechanism.class_filter_matrix().amax(dim=0).unique()
        (1, tensor([1.]))
    """

    _epoch_remedy = "pass steps_per_epoch=... (in train.py: updates_per_epoch), or call task.set_epoch(epoch)"

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        schedule: Alternating | Joint | None = None,
        steps_per_epoch: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, DifferentiatedModel):
            raise TypeError(
                f"expected a differentiated model, neither wrapped nor compiled, but found {type(model).__name__}; "
                "call differentiate() first, and prepare_distributed() or compile() of the task afterwards."
            )
        super().__init__(model, criterion, **options)
        if schedule is not None:
            self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; may also be set once the loader is there."""
        return self._steps_per_epoch

    @steps_per_epoch.setter
    def steps_per_epoch(self, steps: int | None) -> None:
        if steps is not None and (whole(steps) or 0) < 1:
            raise ValueError(f"steps_per_epoch must be a whole number, 1 or more, but is {steps!r}.")
        self._steps_per_epoch = whole(steps)
        self._epoch_is_told = self._epoch_is_told or steps is not None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What ``TrainingMixin.losses`` returns for one batch: ``"loss"``, ``"output"`` and named parts.

        Args:
            input: Images [batch, channels, height, width].
            target: Class indices [batch], soft or multi-hot targets [batch, classes].

        Returns:
            ``"loss"``, a scalar; ``"output"``, logits [batch, classes]; and the unweighted parts of the loss, scalars
            by name.
        """
        return self.losses(self.trainable_module, input, target, self.criterion)

    def attach(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module | None = None,
        **options: Any,
    ) -> Attachment:
        """As ``TrainingMixin.attach``; ``update_ema`` then leaves projecting and counting to the optimizer.

        The difference is small: only attached, a step that an AMP scaler skips does not count.
        """
        return super().attach(optimizer, self.trainable_module if model is None else model, **options)

    def assign_filters(
        self, model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], **options: Any
    ) -> Assignment | None:
        """As ``TrainingMixin.assign_filters``, for the EMA copy as well; before the first step, after a resume."""
        averages = [self.get_trainable_module(ema=True)] if self.has_ema() else []
        return super().assign_filters(model, loader, **{"averages": averages, **options})

    def update_ema(self, step: int | None = None) -> None:
        """To be called after every optimizer step, with EMA or without: project, count, then average.

        Args:
            step: Optimizer steps since the start of training, this one included, as ``train.py`` counts them.

        Raises:
            ValueError: If the schedule or the mechanism goes by epochs, but nobody tells which epoch it is.
        """
        if not attachments_of(self, _inner(self.trainable_module)):
            self.after_step(self.trainable_module)
        if self.steps_per_epoch is not None:
            self.set_epoch((self.progress.step if step is None else step) // self.steps_per_epoch)
        super().update_ema(step)
        if self.has_ema():
            _inner(self.get_trainable_module(ema=True)).project_()  # an average of gates may peak below 1

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> DifferentiationTask:
        """Timm's ``prepare_distributed``; it looks for unused parameters where not all steps take both paths.

        Args:
            device_ids: This process's device; on the CPU left out, which DistributedDataParallel insists on.
            **ddp_kwargs: Options of DistributedDataParallel.
        """
        takes_both_paths = isinstance(self.schedule, Joint) and self.schedule.warmup == 0
        ddp_kwargs.setdefault("find_unused_parameters", not takes_both_paths)
        on_cpu = next(self.trainable_module.parameters()).device.type == "cpu"
        super().prepare_distributed(None if on_cpu else device_ids, **ddp_kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Timm's ``get_clip_parameters``; without the head: neither the classifier's nor the mechanism's.

        timm leaves out the last two parameters, which here would be the classifier's bias and the gate.
        """
        if not exclude_head:
            everything: Iterable[nn.Parameter] = self.trainable_module.parameters()
            return everything
        model: Any = _inner(self.trainable_module)
        classifier = model.get_classifier()
        heads = [*(classifier if isinstance(classifier, (tuple, list)) else [classifier]), model.mechanism]
        excluded = {id(parameter) for head in heads for parameter in head.parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in excluded]

    def get_checkpoint_state(
        self, ema: bool = False, unwrap_fn: Callable[[nn.Module], nn.Module] = unwrap_model
    ) -> dict[str, Any]:
        """Timm's ``get_checkpoint_state``, with plain timm's keys; the mechanism is in the task state."""
        state: dict[str, Any] = super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        for key in state.keys() & {"state_dict", "state_dict_ema"}:
            state[key] = {name: value for name, value in state[key].items() if not name.startswith(MECHANISM_PREFIX)}
        return state

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Timm's ``get_task_state``: the mechanism, its options, and, but for the EMA copy, the training's progress."""
        mechanism = _inner(self.get_eval_model(module, ema=ema)).mechanism
        state = {
            "mechanism": mechanism.name,
            "config": mechanism.config.to_dict(),
            "versions": {"timm_csg": __version__},
            "state": mechanism.state_dict(),
        }
        return state if ema else {**state, "training": self.training_state()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Timm's ``load_task_state``; None: a plain timm checkpoint, the mechanism keeps its values.

        Raises:
            CheckpointError: If the state is that of another mechanism.
            ValueError: If it belongs to another schedule.
        """
        if not state:
            _logger.info("the checkpoint holds no mechanism: the model's keeps its values")
            return
        mechanism = _inner(self.get_eval_model(module, ema=ema)).mechanism
        if state.get("mechanism") != mechanism.name:
            raise CheckpointError(
                f"the checkpoint holds mechanism {state.get('mechanism')!r}, but the model has {mechanism.name!r}; "
                "differentiate accordingly."
            )
        mechanism.load_state_dict(state["state"], strict=strict)
        if not ema and "training" in state:
            self.load_training_state(state["training"])

    def load_checkpoint_state(
        self,
        state_dict: dict[str, Tensor],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """Timm's ``load_checkpoint_state``, for checkpoints of this task and of plain timm."""
        model = self.get_eval_model(ema=ema)
        current = {} if model is None else unwrap_model(model).state_dict()
        own = {name: value for name, value in current.items() if name.startswith(MECHANISM_PREFIX)}
        super().load_checkpoint_state({**own, **state_dict}, task_state, ema=ema, strict=strict)


def load_task_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, ema: bool = False) -> DifferentiatedModel:
    """Give a plain timm model the weights and the mechanism of a checkpoint that ``train.py`` wrote with this task.

    Args:
        model: A plain timm model of the same architecture, made as for training; it is differentiated in place, with
            the options in the checkpoint. One that is differentiated already must fit.
        path: Such as ``model_best.pth.tar``; read without unpickling code.
        ema: Take the averaged weights and the averaged gate.

    Returns:
        The same model, in eval mode, ready for ``timm_csg.save_pretrained``.

    Raises:
        CheckpointError: If the file cannot be read, does not fit, or holds no mechanism, or no EMA.
    """
    path, suffix = Path(path).expanduser(), "_ema" if ema else ""
    checkpoint = load_file(path)
    try:
        weights, own = checkpoint[f"state_dict{suffix}"], checkpoint[f"task_state{suffix}"]
        entries = {key: own[key] for key in ("mechanism", "config", "versions")}
        state = {**weights, **{MECHANISM_PREFIX + name: value for name, value in own["state"].items()}}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} lacks {error}: expected a checkpoint written with DifferentiationTask"
            f"{' and an EMA' if ema else ''}; load plain timm's with timm_csg.load_checkpoint()."
        ) from error
    config = mechanism_config(entries, path)
    differentiated = model if is_differentiated(model) else differentiate(model, mechanism=config)
    try:
        differentiated.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this {type(differentiated).__name__}: {error}") from error
    differentiated.eval()
    return differentiated


def _inner(model: nn.Module) -> DifferentiatedModel:
    inner: DifferentiatedModel = unwrap_model(model)
    return inner
