"""Loaders of the hosts, and the training pictures from which filters are assigned to classes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from timm.data import create_loader


def as_long_as_training(loader: Iterable[Any], batches: float) -> Iterator[Any]:
    """The batches of a loader; of one without a length, which may never end, no more than training takes.

    Args:
        loader: Any loader.
        batches: How many training takes; infinity if that is not known.

    Returns:
        An iterator over the batches.

    Example:
        >>> list(as_long_as_training([1, 2, 3], 2)), list(as_long_as_training(iter([1, 2, 3]), 2))
        ([1, 2, 3], [1, 2])
    """
    try:
        len(loader)  # type: ignore[arg-type]
    except TypeError:  # also that of a DataLoader whose data set is a stream
        if batches != float("inf"):
            return islice(loader, int(batches))
    return iter(loader)


class NotedLoaders:
    """timm's ``create_loader`` for ``train.py``, which notes the training pictures and how to read them plainly.

    Attributes:
        plain: A loader of the training pictures with the options of the validation loader, so without augmentation;
            the training loader itself as long as there is no validation loader, and None before.
    """

    plain: Any = None

    def __call__(self, dataset: Any, *arguments: Any, is_training: bool = False, **options: Any) -> Any:
        """The loader that timm makes."""
        loader = create_loader(dataset, *arguments, is_training=is_training, **options)
        if is_training:
            self.plain = loader
        elif self.plain is not None:
            pictures = self.plain.dataset
            pictures = copy.copy(getattr(pictures, "dataset", pictures))  # in AugMix; timm's loader sets the transform
            self.plain = create_loader(pictures, *arguments, **{**options, "persistent_workers": False})
        return loader
