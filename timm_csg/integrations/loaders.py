"""What the hosts need to know of a loader that is not theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any


def as_long_as_training(loader: Iterable[Any], batches: float) -> Iterator[Any]:
    """The batches of a loader; of one without a length, which may never end, no more than training takes.

    Args:
        loader: Any loader.
        batches: How many training takes; infinity if that is not known.

    Example:
        >>> list(as_long_as_training([1, 2, 3], 2)), list(as_long_as_training(iter([1, 2, 3]), 2))
        ([1, 2, 3], [1, 2])
    """
    try:
        len(loader)  # type: ignore[arg-type]
    except TypeError:  # also of a DataLoader whose data set is a stream
        if batches != float("inf"):
            return islice(loader, int(batches))
    return iter(loader)
