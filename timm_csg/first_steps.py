"""What a training's first steps tell: a mechanism that does not move, and steps that nobody counts.

``attach`` finds both at once. A loop without it is looked at from batch to batch, until all is well or a warning is
due.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from timm_csg.attachment import attachments_of, own_parameters
from timm_csg.first_batch import check_first_batch

_logger = logging.getLogger(__name__)
_MOST = 1000  # batches after which an epoch need not end
_LEAST = 5  # gated batches: an AMP scaler skips some of the first steps


class FirstSteps:
    """One training of a loop, from its first batch until its mechanism has moved and a step was counted."""

    def __init__(self) -> None:
        self.is_new, self.is_done = True, False
        self.batches = self.gated = self.epoch = self.step = 0
        self.own: dict[str, tuple[Tensor, Tensor]] = {}  # values at first, and what projecting alone makes of them
        self.other: tuple[str, Tensor] | None = None

    def look(self, loop: Any, inner: Any, images: Any, targets: Any) -> None:
        """Look at a batch and at what the steps before it have done; costs nothing once all is well.

        Args:
            loop: A ``TrainingMixin``.
            inner: The differentiated model.
            images: Of the batch, checked if it is the first.
            targets: Of the batch.

        Raises:
            TypeError, ValueError: See ``first_batch.check_first_batch``.
        """
        if self.is_new:
            check_first_batch(inner, images, targets)
            self.is_new = False
        if self.is_done or not inner.training:
            return
        own = own_parameters(inner)
        if attachments_of(loop, inner) or any(hasattr(value, "full_tensor") for value in own.values()):
            self.is_done = True
            return
        if self.batches == 0 or self.own.keys() != own.keys():
            self._begin(loop, inner, own)
        elif self._has_trained(inner):
            self._judge(loop, own)
        self.batches += 1
        weights = inner.mechanism.loss_weights().values()
        self.gated += loop.path != "standard" and any(isinstance(weight, Tensor) or weight > 0 for weight in weights)

    def _begin(self, loop: Any, inner: Any, own: dict[str, Any]) -> None:
        self.epoch, self.step, self.batches, self.gated = loop.progress.epoch, loop.progress.step, 0, 0
        projected = copy.deepcopy(inner.mechanism)
        with torch.no_grad():
            projected.project_()
        after = dict(projected.named_parameters(prefix="mechanism"))
        self.own = {name: (value.detach().clone(), after[name].detach()) for name, value in own.items()}
        named = [(name, value) for name, value in inner.named_parameters() if value.requires_grad and name not in own]
        self.other = (named[-1][0], named[-1][1].detach().clone()) if named else None  # of the classifier

    def _has_trained(self, inner: Any) -> bool:
        """Whether an optimizer has moved the other parameter."""
        if self.other is None:
            return False
        name, before = self.other
        now = dict(inner.named_parameters()).get(name)
        return now is not None and now.shape == before.shape and not torch.equal(now.detach(), before)

    def _judge(self, loop: Any, own: dict[str, Any]) -> None:
        has_moved = not own or any(
            not any(torch.equal(value.detach(), known) for known in self.own[name]) for name, value in own.items()
        )
        is_counted = loop.progress.step > self.step
        if has_moved and is_counted:
            self.is_done, self.own = True, {}
        is_over = loop.progress.epoch != self.epoch
        if not is_counted and (is_over or self.batches >= _MOST):
            self._warn(
                "%d batches were trained, but no step was counted and the mechanism was never projected; call "
                "loop.attach(optimizer, model) before training, or loop.after_step(model) after every optimizer.step()",
                self.batches,
            )
        elif not has_moved and self.gated >= (_LEAST if is_over else _MOST):
            self._warn(
                "%s did not change in %d gated batches while other parameters did: the optimizer lacks them, or their "
                "learning rate is too small; make it of timm_csg.param_groups(model, lr=...) after differentiate(), "
                "and loop.attach(optimizer, model) checks it",
                ", ".join(own),
                self.gated,
            )

    def _warn(self, text: str, *values: object) -> None:
        _logger.warning(text, *values)
        self.is_done, self.own = True, {}
