"""Names of classes: those of the data, and those of a model or of the training split, matched by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_csg import labels
from timm_csg.cli.settings import TrainSettings
from timm_csg.manifest import short

_logger = logging.getLogger(__name__)


def class_names(dataset: Any, settings: TrainSettings, *, default: int | None = None) -> list[str]:
    """Names of a data set's classes in the order of its labels, or their numbers.

    Args:
        dataset: A split.
        settings: Of them ``num_classes`` counts.
        default: How many there are where the data does not tell.

    Raises:
        ValueError: If their number is not known, or not that of the settings.
    """
    names = names_in(dataset)
    count = settings.num_classes or len(names) or default
    if count is None:
        raise ValueError(f"--data {settings.data} does not say how many classes it has; add --num-classes.")
    if names and len(names) != count:
        raise ValueError(f"--num-classes is {count}, but the data has {len(names)} classes.")
    return names or _numbers(count)


def names_in(dataset: Any) -> list[str]:
    """Names of a data set's classes in the order of its labels; empty if it does not say."""
    reader = getattr(dataset, "reader", dataset)
    candidates = (getattr(reader, name, None) for name in ("class_to_idx", "class_name_to_idx"))  # folders; tar files
    labels_by_name: dict[str, int] = next(filter(None, candidates), {})
    return [str(name) for name in sorted(labels_by_name, key=labels_by_name.__getitem__)]


def match_classes(
    checkpoint: str, model: nn.Module, found: list[str], settings: TrainSettings
) -> tuple[list[str], list[int] | None]:
    """The names of a model's classes, and for each label of the data the model's own; None where they agree.

    Args:
        checkpoint: What the model was loaded from, for errors.
        model: Its classes count, where it has names.
        found: Names of the classes of the data, or their numbers.
        settings: What the data is called.

    Raises:
        ValueError: If the data has classes that the model lacks, or, without names, another number of them.
    """
    count = int(model.num_classes)  # type: ignore[arg-type]
    own = labels.class_names(model)
    has_names = own is not None and own != _numbers(count)
    if own is not None and has_names and found != _numbers(len(found)):
        return own, new_labels(own, found, of=checkpoint, data=f"--data {settings.data}")
    if len(found) != count:
        raise ValueError(
            f"{checkpoint} has {count} classes, but --data {settings.data} has {len(found)}; use the data that the "
            "model was trained on, or one folder for each of its classes."
        )
    return own if own is not None and has_names else found, None


def new_labels(own: Sequence[str], found: Sequence[str], *, of: str, data: str) -> list[int] | None:
    """For each label of the data the one of the same name; None where they agree.

    Folders are numbered by name in each split on its own, so one missing class would shift all that follow.

    Args:
        own: The classes in the order of the labels to give.
        found: The classes of the data, in the order of its labels.
        of: Whose classes ``own`` are, for errors.
        data: What has the others.

    Raises:
        ValueError: If the data has classes that are not among ``own``.

    Example:
        >>> new_labels(["ant", "bee", "cow"], ["ant", "cow"], of="the training split", data="the validation split")
        [0, 2]
    """
    unknown, missing = sorted(set(found) - set(own)), sorted(set(own) - set(found))
    if unknown:
        known = short(", ".join(own[:8])) + (", ..." if len(own) > 8 else "")
        raise ValueError(
            f"{data} has classes missing from {of}: {short(', '.join(unknown[:8]))}; it has {known}. Use images of "
            "those classes, in folders of the same names."
        )
    if missing:
        names = short(", ".join(missing[:8]))
        _logger.warning("there are no images of: %s; nothing is measured for these classes (%s)", names, data)
    return None if list(found) == list(own) else [own.index(name) for name in found]


def _numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]
