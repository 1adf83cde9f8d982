"""Which path a training step takes: standard, gated, or both in one backbone pass.

Liang et al., ECCV 2020 (https://arxiv.org/abs/2007.08194) describe two schemes: the normal one, in which every batch
goes through both paths, and the alternating one, in which a few epochs of every period go through the gated path only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm_csg.checks import check_choice, make_numbers_plain

Path = Literal["standard", "gated", "both"]
Unit = Literal["epoch", "step"]


def _check_unit_and_warmup(unit: str, warmup: int) -> None:
    check_choice("unit", unit, ("epoch", "step"))
    if not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup must be a number of {unit}s, 0 or more, but is {warmup!r}.")


@dataclass(frozen=True)
class Alternating:
    """The alternating scheme: the last ``gated`` of every ``period`` epochs (or steps) train the gated path only.

    The default, one epoch in three, is the share of the authors' released runs; they add ``warmup=10``.

    Args:
        period: Length of one cycle, in units.
        gated: How many units at the end of each cycle take the gated path, 0 to ``period``.
        warmup: Units at the start of training that always take the standard path. The cycle is counted from unit 0, as
            the authors do, so ``warmup=10`` with ``period=3`` makes epoch 11 the first gated one.
        unit: ``"epoch"`` or ``"step"`` (optimizer steps since the start of training).

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> [Alternating(period=3, gated=1).path(epoch, step=0) for epoch in range(4)]
        ['standard', 'standard', 'gated', 'standard']
    """

    period: int = 3
    gated: int = 1
    warmup: int = 0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        _check_unit_and_warmup(self.unit, self.warmup)
        if not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period must be a whole number, 1 or more, but is {self.period!r}.")
        if not isinstance(self.gated, int) or not 0 <= self.gated <= self.period:
            raise ValueError(f"gated must lie between 0 and period={self.period}, but is {self.gated!r}.")

    def path(self, epoch: int, step: int) -> Path:
        """The path of this epoch and optimizer step, both counted from 0.

        Args:
            epoch: Counted from 0.
            step: Optimizer steps of the whole training so far, counted from 0.

        Returns:
            ``"standard"`` or ``"gated"``.
        """
        index = epoch if self.unit == "epoch" else step
        if index < self.warmup or index % self.period < self.period - self.gated:
            return "standard"
        return "gated"

    @property
    def goes_by_epochs(self) -> bool:
        """Whether the path depends on the epoch, so that somebody has to tell it."""
        return self.unit == "epoch" and (0 < self.gated < self.period or (self.warmup > 0 and self.gated > 0))


@dataclass(frozen=True)
class Joint:
    """The normal scheme: every step trains both paths, at the price of one backbone pass.

    Args:
        warmup: Units at the start of training that take the standard path only.
        unit: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> Joint().path(epoch=0, step=0), Joint(warmup=1).path(epoch=0, step=0)
        ('both', 'standard')
    """

    warmup: int = 0
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        make_numbers_plain(self)
        _check_unit_and_warmup(self.unit, self.warmup)

    def path(self, epoch: int, step: int) -> Path:
        """The path of this epoch and optimizer step, both counted from 0.

        Args:
            epoch: Counted from 0.
            step: Optimizer steps of the whole training so far, counted from 0.

        Returns:
            ``"both"``; during the warm-up ``"standard"``.
        """
        return "standard" if (epoch if self.unit == "epoch" else step) < self.warmup else "both"

    @property
    def goes_by_epochs(self) -> bool:
        """Whether the path depends on the epoch, so that somebody has to tell it."""
        return self.unit == "epoch" and self.warmup > 0
