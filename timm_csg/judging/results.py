"""What every judge returns: the number, what chance would have, and the value of every picture."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from timm_csg.metrics.display import in_one_line


@in_one_line
class Judged(NamedTuple):
    """A judge's answer.

    Attributes:
        score: Mean over the values that are not NaN.
        chance: What a map that knows nothing of the picture would have; each judge's docstring says how it is found.
        values: The number of every picture (of every class in a grid, of every filter) that was judged, float32; NaN
            where it is not defined.
        seconds: Time taken, explanations included; NaN from the pure functions of maps, which take next to none.
    """

    score: float
    chance: float
    values: Tensor
    seconds: float = math.nan

    @property
    def standard_error(self) -> float:
        """Of the score, over the values as if they were independent; NaN for fewer than two."""
        known = self.values[~self.values.isnan()].double()
        return float(known.std() / len(known) ** 0.5) if len(known) > 1 else math.nan


def judged(values: Tensor, chance: Tensor | float) -> Judged:
    """A result from values of single pictures, and chance's values of the same or its mean.

    Raises:
        ValueError: If no value is defined.
    """
    if bool(values.isnan().all()):
        raise ValueError("no picture can be judged: there is no object in any of them; check boxes or masks.")
    by_chance = float(chance.double().nanmean()) if isinstance(chance, Tensor) else chance
    return Judged(float(values.double().nanmean()), by_chance, values.detach().float().cpu())


def of_another_picture(maps: Tensor) -> Tensor:
    """The maps dealt to other pictures: those half the data further on, which are mostly of another class.

    They have the right size, smoothness and centre, but know nothing of the picture: what they score is chance.
    """
    return maps.roll(max(1, len(maps) // 2), dims=0)
