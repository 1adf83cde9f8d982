"""A model while it is measured: what one pass over the images gave, and what several numbers need of it, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_csg import metrics
from timm_csg.head import HeadOnPooled, find_linear_head, head_on_pooled
from timm_csg.measuring.ablating import ablate
from timm_csg.measuring.collecting import Activations
from timm_csg.model import is_differentiated
from timm_csg.running import evaluating

_BATCH = 256
Found = TypeVar("Found")


@dataclass(eq=False)
class Subject:
    """A model while it is measured; everything is computed when it is first asked for.

    Attributes:
        model: A plain or differentiated timm classifier.
        loader: The images, in the same order every time.
        seen: Features, targets and logits of all images.
        num_classes: Number of classes.
        seed: Of everything random.
        amp_dtype: Autocast dtype of the passes; None: no autocast.
        standard_accuracy: Of standard training on the same images, for the verdict; None: not known.
        options: Files and attacks that some numbers need, see ``measure``.
        most_passes: How often a head that is not linear may run for each batch when filters are removed; None: always.
        tick: Called with the number of images that another pass has done.
    """

    model: nn.Module
    loader: Iterable[tuple[Tensor, Tensor]]
    seen: Activations
    num_classes: int
    seed: int = 0
    amp_dtype: torch.dtype | None = None
    standard_accuracy: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    most_passes: int | None = None
    tick: Callable[[int], None] = lambda images: None
    _found: dict[Callable[..., Any], Any] = field(default_factory=dict)

    def once(self, compute: Callable[[Subject], Found]) -> Found:
        """``compute(self)``, computed when it is first asked for."""
        if compute not in self._found:
            self._found[compute] = compute(self)
        found: Found = self._found[compute]
        return found

    @cached_property
    def gate(self) -> Tensor | None:
        """The mechanism's class-filter matrix on the CPU; None without a mechanism, or if it has none."""
        matrix = self.model.mechanism.class_filter_matrix() if is_differentiated(self.model) else None
        return None if matrix is None else matrix.detach().float().cpu()

    @cached_property
    def mutual(self) -> Tensor:
        """Mutual information [classes, filters], nats."""
        return metrics.mutual_information(
            self.seen.features, self.seen.targets, self.num_classes, random_state=self.seed
        )

    @property
    def ownership(self) -> Tensor:
        """What says which class a filter belongs to: the gate or assignment, else the mutual information."""
        return self.mutual if self.gate is None else self.gate

    @cached_property
    def owned(self) -> Tensor:
        """Which filters are each class's own, bool [classes, filters]."""
        return metrics.owned_filters(self.ownership)

    @cached_property
    def owners(self) -> Tensor:
        """The class that owns each filter [filters], the first one where several do; -1 where none does."""
        return metrics.owners(self.ownership)

    @cached_property
    def pooled_head(self) -> HeadOnPooled | None:
        """The head as a model of its own, where pooled features are all that it needs, see ``head_on_pooled``."""
        return head_on_pooled(self.model, self.seen.features[:64], self.seen.logits[:64])

    @cached_property
    def removal(self) -> metrics.Ablation | None:
        """Accuracies without the filters of each class; None if ``most_passes`` is too few for that."""
        return self._ablation(keep_only=False)

    @cached_property
    def isolation(self) -> metrics.Ablation | None:
        """Accuracies with the filters of each class alone; None as ``removal``."""
        return self._ablation(keep_only=True)

    def _ablation(self, *, keep_only: bool) -> metrics.Ablation | None:
        """From the pooled features where the head needs no more, else by another pass over the images."""
        head = self.pooled_head
        if self.most_passes is not None and self.num_classes > self.most_passes and not self._is_linear:
            return None
        model, batches, amp_dtype = self.model, self.batches(), self.amp_dtype
        if head is not None:
            columns = (self.seen.features[:, :, None, None].split(_BATCH), self.seen.targets.split(_BATCH))
            model, batches, amp_dtype = head, zip(*columns, strict=True), None
        return ablate(model, batches, self.owned, self.num_classes, keep_only=keep_only, amp_dtype=amp_dtype)

    @property
    def _is_linear(self) -> bool:
        """Whether one product serves all classes when filters are removed."""
        head = self.pooled_head
        if head is None:
            return False
        with evaluating(head):
            some = self.seen.features[:64, :, None, None].to(next(head.parameters()).device)
            return find_linear_head(head, head.forward_features(some)) is not None

    @cached_property
    def verdict(self) -> metrics.Verdict | None:
        """Whether the owners can be trusted; None without a gate or assignment."""
        if self.gate is None:
            return None
        return metrics.verdict(
            self.gate,
            self.seen.features,
            self.seen.targets,
            accuracy=metrics.accuracy(self.seen.logits, self.seen.targets),
            removal=self.removal,
            standard_accuracy=self.standard_accuracy,
            masked=self._is_masked,
        )

    @property
    def _is_masked(self) -> bool:
        """Whether the classifier gives a class no filter that is not its own."""
        weight = self.model.read_head().weight if is_differentiated(self.model) else None
        if weight is None or self.gate is None or bool((self.gate > 0).all()):
            return False
        return not bool((weight.detach() * (self.gate == 0).to(weight.device)).any())

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Another pass over the images."""
        for images, targets in self.loader:
            yield images, targets
            self.tick(len(targets))
