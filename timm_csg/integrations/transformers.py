"""Train a timm model in transformers' ``TimmWrapperForImageClassification`` with its ``Trainer``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from timm_csg.attachment import Attachment, bare_optimizers
from timm_csg.integrations.loaders import as_long_as_training
from timm_csg.model import DifferentiatedModel, PathOutputs
from timm_csg.training import Progress, TrainingMixin

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object


class TransformersTrainingMixin(TrainingMixin, _Host):  # type: ignore[misc]  # transformers' types are not checked
    """``TrainingMixin`` for transformers' ``Trainer``; name it first among the bases.

    The model is a ``TimmWrapperForImageClassification`` whose ``timm_model`` is differentiated. Before the first step
    its filters are assigned to classes, see ``assignment_loader``. Training takes the paths of the schedule, evaluation
    and prediction the standard path. The gate gets an optimizer group of its own, without weight decay. Checkpoints of
    the Trainer hold the mechanism and the progress;
    ``timm_csg.save_pretrained(trainer.model.timm_model, folder)`` makes one that plain timm and transformers load.

    Attributes:
        gate_lr: Learning rate of the mechanism's parameters; None: that of the weights.

    Example:
        >>> import timm_csg
        >>> class DifferentiationTrainer(TransformersTrainingMixin):  # and transformers.Trainer
        ...     schedule = timm_csg.Joint()
        ...     gate_lr = 0.004  # as the recipe has it for AdamW
    """

    gate_lr: float | None = None
    loss_is_scaled_for_ga: bool = False  # a mean over the batch: the Trainer divides it by the accumulation steps
    _attachment: Attachment | None = None

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy with the Trainer's ``label_smoothing_factor``; override it for another one.

        Args:
            logits: [batch, classes].
            targets: Class indices [batch], soft or multi-hot targets [batch, classes].

        Returns:
            Scalar: a mean over the batch.
        """
        return F.cross_entropy(logits, targets, label_smoothing=self.args.label_smoothing_factor)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the paths that the schedule asks for; in eval mode that of the standard path.

        Args:
            model: The model as the Trainer wraps it.
            inputs: ``pixel_values`` [batch, channels, height, width] and ``labels``, class indices [batch].
            return_outputs: Whether to return the outputs, too.
            num_items_in_batch: Not looked at.

        Returns:
            The loss, a scalar; with ``return_outputs`` the loss and the outputs.

        Raises:
            ValueError: If the inputs hold no ``labels``.
        """
        images, targets = _pair(inputs)
        losses = self.losses(cast(nn.Module, _Wrapped(model)), images, targets, self.criterion)
        return (losses["loss"], {"logits": losses["output"]}) if return_outputs else losses["loss"]

    def assignment_loader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The pictures from which filters are assigned to classes: those of training.

        Override it to leave out augmentation, with a loader of (images, targets).

        Raises:
            ValueError: If the inputs hold no ``labels``.
        """
        loader = self.callback_handler.train_dataloader
        batches = self.state.max_steps * self.args.gradient_accumulation_steps
        for inputs in as_long_as_training(loader, batches):
            yield _pair(self._prepare_inputs(inputs))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, the mechanism in a group of its own, attached; one of yours is only attached.

        Args:
            *args: What the Trainer's takes.
            **kwargs: The same.

        Returns:
            The optimizer.

        Raises:
            TypeError: If the model is not a timm wrapper with a differentiated model.
        """
        is_ours = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        (inner,) = bare_optimizers(optimizer)  # without accelerate's wrapper, when train() is called again
        model = _timm_model(self.model)
        if is_ours:
            _move_to_own_group(inner, list(model.mechanism.parameters()), self.gate_lr)
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self.attach(inner, model)
        callback = _ProgressCallback(self)
        self.remove_callback(_ProgressCallback)
        self.add_callback(callback)
        # The Trainer has read the state of a checkpoint by now; in one of a plain Trainer our entry is missing.
        saved = self.state.stateful_callbacks.setdefault(_ProgressCallback.__name__, callback.state())
        self.load_training_state(saved["attributes"]["training_state"])
        return cast(torch.optim.Optimizer, optimizer)


class _ProgressCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Tells the loop the epoch, and the Trainer's saved state the progress."""

    def __init__(self, loop: TransformersTrainingMixin | None = None) -> None:
        self.loop = loop  # None only where the Trainer rebuilds its callbacks on resume, before we replace this one
        self.next_epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.next_epoch = int(state.epoch or 0)
        if self.loop is not None and state.global_step == 0:
            self.loop.progress = Progress()  # train() a second time
            self.loop.assign_filters(_timm_model(self.loop.model), self.loop.assignment_loader())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.loop is not None:
            self.loop.set_epoch(self.next_epoch)
        self.next_epoch += 1

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"training_state": self.loop.training_state() if self.loop else None}}


class _Wrapped:
    """The Trainer's model, wrapped or not, called as a differentiated model is called.

    ``TimmWrapperForImageClassification`` hands keyword arguments on to timm's forward, so the call goes through all
    that the Trainer put around the model (DistributedDataParallel, autocast).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.module, self.training = model, _timm_model(model), model.training

    def __call__(self, images: Tensor, targets: Tensor, *, paths: Sequence[str]) -> PathOutputs:
        (outputs,) = self.model(pixel_values=images, targets=targets, paths=paths, return_dict=False)
        return cast(PathOutputs, outputs)


def _pair(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if inputs.get("pixel_values") is None or inputs.get("labels") is None:
        raise ValueError(f"expected inputs with 'pixel_values' and 'labels', but found {sorted(inputs)}.")
    return inputs["pixel_values"], inputs["labels"]


def _timm_model(model: nn.Module) -> DifferentiatedModel:
    wrapper = unwrap_model(model)
    inner = getattr(wrapper, "timm_model", None)
    if not isinstance(inner, DifferentiatedModel):
        raise TypeError(
            "expected a TimmWrapperForImageClassification with a differentiated model, but found "
            f"{type(wrapper).__name__}{'' if inner is None else f' with {type(inner).__name__}'}; "
            "call timm_csg.differentiate(model.timm_model, ...) before training."
        )
    return inner


def _move_to_own_group(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], lr: float | None) -> None:
    if not own:
        return
    ids = {id(parameter) for parameter in own}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    options |= {"weight_decay": 0.0, "use_fallback": True} | ({} if lr is None else {"lr": lr})
    optimizer.add_param_group({"params": own, **options})
