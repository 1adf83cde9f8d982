"""Train a differentiated model in any loop: assignment of filters, extra loss terms, schedule, projection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_csg.assignment import Assignment, assign_filters, find_assigned, has_assigned
from timm_csg.attachment import Attachment, bare_optimizers, check_by_hand, check_optimizers, check_replicas
from timm_csg.checks import make_numbers_plain
from timm_csg.first_steps import FirstSteps
from timm_csg.mechanisms.assigned import read_assignment
from timm_csg.mechanisms.base import Mechanism
from timm_csg.model import DifferentiatedModel, PathOutputs
from timm_csg.schedule import Alternating, Joint, Path

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Attributes:
        epoch: The epoch last given to ``set_epoch``.
        step: Optimizer steps done since the start of training.

    Raises:
        ValueError: If one is not a whole number, 0 or more.
    """

    epoch: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        if not all(isinstance(count, int) and count >= 0 for count in (self.epoch, self.step)):
            raise ValueError(f"epoch and step must be whole numbers, 0 or more, but found {self}.")


class TrainingMixin:
    """Losses, schedule and projection for any training loop; mix it in, or use it as it is.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet"), num_classes=2).train()
        >>> optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.1), lr=0.1)
        >>> loop = TrainingMixin()
        >>> loop.schedule = Joint()
        >>> handle = loop.attach(optimizer, model)
        >>> losses = loop.losses(model, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), nn.functional.cross_entropy)
        >>> sorted(losses)
        ['gated', 'gated_output', 'loss', 'output', 'solo', 'standard']
        >>> losses["loss"].backward(); optimizer.step()
        >>> model.mechanism.class_filter_matrix().amax(dim=0).unique()
        tensor([1.])
    """

    schedule: Alternating | Joint = Alternating()
    progress: Progress = Progress()  # frozen: replaced, never changed, since this one is shared by all instances
    _epoch_remedy = "call loop.set_epoch(epoch) at the beginning of every epoch, counted from 0"
    _epoch_is_told: bool = False
    _schedule_is_checked: bool = False
    _first_steps: FirstSteps | None = None

    @property
    def path(self) -> Path:
        """The path of the coming step."""
        return self.schedule.path(self.progress.epoch, self.progress.step)

    def set_epoch(self, epoch: int) -> None:
        """Tell the schedule which epoch begins.

        Args:
            epoch: Counted from 0.
        """
        self.progress = replace(self.progress, epoch=epoch)
        self._epoch_is_told = True

    def assign_filters(
        self,
        model: nn.Module,
        loader: Iterable[tuple[Tensor, Tensor]],
        *,
        averages: Iterable[nn.Module] = (),
        amp_dtype: torch.dtype | None = None,
    ) -> Assignment | None:
        """Give the filters to classes before the first step, as ``timm_csg.assign_filters`` does, unless that is done.

        Nothing happens to a model without assigned filters, to one whose filters were assigned before (resumed,
        loaded), and after the first step; so call it whenever training starts. Under torch.distributed call it in every
        process; all get the same assignment.

        Args:
            model: The differentiated model, also wrapped or compiled.
            loader: Training pictures, best without augmentation; with several processes, each one's share, or all.
            averages: EMA or SWA copies that were made already; they get the same assignment.
            amp_dtype: Autocast dtype; None: no autocast.

        Returns:
            The assignment; None if nothing was done.

        Raises:
            TypeError: If the model is not differentiated.
            ValueError: If the loader yields nothing, a class has no pictures, or responses are not finite.
        """
        inner = _inner(model)
        if self.progress.step or not has_assigned(inner):
            return None
        mechanism = find_assigned(inner)[1]
        if mechanism.assigned_from_data:
            return None
        _logger.info("filters are assigned to classes: one pass over the training pictures")
        start, several = time.perf_counter(), dist.is_available() and dist.is_initialized()
        assignment = assign_filters(inner, loader, amp_dtype=amp_dtype, distributed=several)
        _logger.info("filters were assigned to classes in %.1f s: %r", time.perf_counter() - start, assignment)
        for average in averages:
            copy, its_mechanism = find_assigned(average)
            its_mechanism.load_state_dict(mechanism.state_dict())
            its_mechanism.restart_classifier_(copy.read_head())
        return assignment

    def losses(
        self, model: nn.Module, images: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """All losses of one batch on the path that the schedule asks for; in eval mode on the standard path.

        Args:
            model: A differentiated model, also wrapped in DistributedDataParallel or compiled.
            images: [batch, channels, height, width].
            targets: Class indices [batch], soft or multi-hot targets [batch, classes].
            criterion: Called with (logits, targets), returns a scalar.

        Returns:
            ``"loss"``: to back-propagate. Its gradient is that of the weighted sum of all terms; its value is the
            criterion on the main output alone, so that curves of losses do not jump where the mechanism's terms, which
            need not go to 0, come and go. ``"output"``: logits of the standard path, or of the gated
            one if only that ran, and ``"gated_output"`` where it ran; ``"standard"``, ``"gated"`` and the mechanism's
            terms: detached, unweighted scalars of what ran.

        Raises:
            TypeError: If the model is not differentiated, or the images are not floating-point numbers.
            ValueError: If the criterion returns no scalar, or DistributedDataParallel was wrapped around the model
                before its mechanism was there.
        """
        inner = _inner(model)
        if self._first_steps is None:
            self._first_steps = FirstSteps()
        self._first_steps.look(self, inner, images, targets)
        check_replicas(model, inner)
        mechanism = inner.mechanism
        mechanism.set_epoch(self.progress.epoch)
        path = self.path if model.training else "standard"
        outputs: PathOutputs = model(images, targets, paths=("standard", "gated") if path == "both" else (path,))
        terms = dict(outputs.losses)
        if outputs.gated is not None and (outputs.standard is None or mechanism.paths_differ):
            terms["gated"] = criterion(outputs.gated, targets)
        weights = mechanism.loss_weights()
        trained = [name for name in terms if isinstance(weights[name], Tensor) or weights[name]]  # others are shown
        parts = [weights[name] * terms[name] for name in trained]
        if outputs.standard is not None:
            terms["standard"] = criterion(outputs.standard, targets)
            parts.append(terms["standard"])
        result = {name: term.detach().clone() for name, term in terms.items()}  # hosts divide the loss in place
        total = sum(parts[1:], start=parts[0])
        if total.ndim:
            raise ValueError(
                f"criterion must return one number for the batch, but returns shape {list(total.shape)}; average it."
            )
        shown = terms["gated" if outputs.standard is None else "standard"].detach()
        result["loss"] = shown + (total - total.detach())  # NaN where any term is not finite
        if outputs.gated is not None:
            result["output"] = result["gated_output"] = outputs.gated
        if outputs.standard is not None:
            result["output"] = outputs.standard
        return result

    def after_step(self, model: nn.Module) -> None:
        """Project the mechanism's parameters and count the step; ``attach`` does it after every optimizer step.

        Args:
            model: The model that was trained, wrapped or not.

        Raises:
            ValueError: If ``attach`` does it already, or the epoch is not set and the schedule goes by epochs.
        """
        inner = _inner(model)
        check_by_hand(self, inner)
        self._check_schedule(inner.mechanism)
        inner.project_()
        self.progress = replace(self.progress, step=self.progress.step + 1)

    def attach(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module,
        *,
        averages: Sequence[nn.Module] = (),
        frozen: bool = False,
    ) -> Attachment:
        """Make every ``optimizer.step()`` end in ``after_step``; steps that an AMP scaler skips do not count.

        On a standard step the mechanism's gradients are cleared before the optimizer runs, so that momentum and weight
        decay cannot move a gate that took no part (``zero_grad(set_to_none=False)`` would leave zeros there). Attaching
        the same optimizer again takes the place of the first time.

        Args:
            optimizer: Any optimizer. With one optimizer per path (``optimizers[loop.path]``), attach both. Optimizers
                that share the parameters between them are given together, as a list.
            model: The differentiated model, also wrapped or compiled.
            averages: EMA or SWA copies of the model (``ModelEmaV3``, ``AveragedModel``); each of their updates then
                ends in a projection, too.
            frozen: Whether the mechanism's parameters are frozen on purpose.

        Returns:
            A handle whose ``remove()`` detaches.

        Raises:
            TypeError: If the model is not differentiated, or an argument is something else.
            ValueError: If the optimizers lack parameters of the mechanism or of a new classifier, the mechanism is
                frozen, an average was made before the filters were assigned and did not get the assignment, or
                DistributedDataParallel does not know it. ``optimizer.step()`` raises it if the schedule asks
                for the gated path and no gradient reaches the mechanism, or the classifier was reset.
        """
        optimizers, inner = bare_optimizers(optimizer), _inner(model)
        check_replicas(model, inner)
        check_optimizers(optimizers, inner, frozen=frozen)
        _check_averages(averages, inner)
        if has_assigned(inner):
            read_assignment(find_assigned(inner)[1])
        return Attachment(self, model, inner, optimizers, averages)

    def _check_schedule(self, mechanism: Mechanism) -> None:
        """Raise at the first step if nobody tells the epoch that matters; log if nobody chose a schedule."""
        if not self._epoch_is_told and (self.schedule.goes_by_epochs or mechanism.goes_by_epochs):
            raise ValueError(
                f"{self.schedule} or mechanism {mechanism.name!r} goes by epochs, but the epoch is not set; "
                f"{self._epoch_remedy}."
            )
        if not self._schedule_is_checked and self.schedule is TrainingMixin.schedule:
            _logger.warning("no schedule was set, so that this is %s; set loop.schedule before training", self.schedule)
        self._schedule_is_checked = True

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint needs to continue at the same epoch and step: a JSON-able dictionary."""
        schedule = {"kind": type(self.schedule).__name__, **asdict(self.schedule)}
        return {"progress": asdict(self.progress), "schedule": schedule}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue where ``training_state`` was taken.

        Args:
            state: What it returned.

        Raises:
            ValueError: If the state is damaged or belongs to another schedule.
        """
        try:
            progress = Progress(**state["progress"])
            schedule = state["schedule"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected the dictionary made by training_state(), but found {state!r}.") from error
        if schedule != self.training_state()["schedule"]:
            raise ValueError(
                f"the state belongs to the schedule {schedule}, but this loop has {self.schedule}; "
                "set loop.schedule first."
            )
        self.progress = progress


def _check_averages(averages: Iterable[nn.Module], inner: DifferentiatedModel) -> None:
    """Raise if an average lacks the assignment of its model: timm's would take many epochs to learn its statistics."""
    for average in averages if has_assigned(inner) else ():
        is_behind = has_assigned(average) and not find_assigned(average)[1].assigned_from_data
        if is_behind and find_assigned(inner)[1].assigned_from_data:
            raise ValueError(
                f"this {type(average).__name__} was made before the filters were assigned and does not know the "
                "assignment; make it after assign_filters(), or name it there: loop.assign_filters(model, loader, "
                "averages=[average])."
            )


def _inner(model: nn.Module) -> DifferentiatedModel:
    inner = unwrap_model(model)
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()
    if not isinstance(inner, DifferentiatedModel):
        parts = inner.named_modules() if isinstance(inner, nn.Module) else ()
        inside = [name for name, module in parts if isinstance(module, DifferentiatedModel)]
        remedy = f"pass the one in it, .{inside[0]}." if inside else "call differentiate() first."
        raise TypeError(f"expected a differentiated model, but found {type(inner).__name__}; {remedy}")
    return inner
