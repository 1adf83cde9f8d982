"""Results as pandas data frames; pandas is optional and imported when one is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas

_SAMPLE, _CLASS, _FILTER, _IMAGE = "sample", "class", "filter", "image"
# What the axes of each tensor are, by type and field; axes that all fields begin with are rows.
AXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Activations": {
        "targets": (_SAMPLE,),
        "logits": (_SAMPLE, _CLASS),
        "gated_logits": (_SAMPLE, _CLASS),
        "features": (_SAMPLE, _FILTER),
    },
    "Ablation": {"before": (_CLASS,), "after": (_CLASS, _CLASS)},
    "ClassInformation": dict.fromkeys(("best", "best_filter", "filters", "mean_of_own"), (_CLASS,)),
    "ClassRates": {
        "sensitivity": (_CLASS,),
        "specificity": (_CLASS,),
        "sensitivity_interval": (_CLASS, "end"),
        "specificity_interval": (_CLASS, "end"),
    },
    "FilterInformation": dict.fromkeys(("best", "best_class", "second", "second_class", "selectivity"), (_FILTER,)),
    "ClassFilters": dict.fromkeys(("filters", "contribution", "share"), (_IMAGE, "rank")),
    "StrongestImages": {
        "indices": (_FILTER, "rank"),
        "values": (_FILTER, "rank"),
        "positions": (_FILTER, "rank", "axis"),
    },
}


def to_dataframe(values: Any, class_names: Sequence[str] | None = None) -> pandas.DataFrame:
    """A result, or a tensor of classes and filters, as a pandas data frame.

    Args:
        values: ``Activations`` (a row for each image), ``Ablation`` and ``ClassInformation`` (for each class),
            ``FilterInformation`` (for each filter), ``explain.ClassFilters``, ``explain.StrongestImages`` (for each
            image or filter and rank), an explanation of ``explain.explain_prediction`` (for each filter); a matrix
            [classes, filters], such as a gate or mutual information; or owners, integers [filters].
        class_names: Names for the classes; None: their numbers.

    Returns:
        The data frame; what has a second axis becomes columns such as ``logits_cat`` and ``features_12``.

    Raises:
        ImportError: If pandas is missing; the message says how to install it.
        TypeError: If it is none of these.
        ValueError: If there is not one name for each class.

    Example:
        >>> import torch
        >>> to_dataframe(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["cat", "dog"])
        filter    0    1
        class
        cat     1.0  0.0
        dog     0.0  1.0
    """
    if isinstance(values, Tensor):
        return _of_tensor(values, class_names)
    axes = AXES.get(type(values).__name__)
    if axes is not None:
        fields = {name: getattr(values, name) for name in axes}
        fields = {name: value for name, value in fields.items() if value is not None}
        return _of_fields(fields, axes, class_names)
    if dataclasses.is_dataclass(values) and hasattr(values, "to_dataframe"):
        frame: pandas.DataFrame = values.to_dataframe()
        return frame
    raise TypeError(
        f"expected a result such as {', '.join(AXES)}, an explanation, a tensor [classes, filters] or owners "
        f"[filters], but found {type(values).__name__}."
    )


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas: pip install pandas.") from error
    return pandas


def frame_of_rows(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """A data frame with a row for each mapping.

    Raises:
        ImportError: If pandas is missing.
    """
    frame: pandas.DataFrame = _pandas().DataFrame(list(rows))
    return frame


def _labels(axis: str, size: int, class_names: Sequence[str] | None) -> list[Any]:
    if axis != _CLASS or class_names is None:
        return list(range(size))
    if len(class_names) != size:
        raise ValueError(f"class_names must hold one name for each of the {size} classes, but hold {len(class_names)}.")
    return list(class_names)


def _of_tensor(values: Tensor, class_names: Sequence[str] | None) -> pandas.DataFrame:
    pd = _pandas()
    if values.ndim == 1 and not values.is_floating_point():
        owners = values.tolist()
        columns: dict[str, Any] = {"owner": owners}
        if class_names is not None:
            if max(owners, default=0) >= len(class_names):
                raise ValueError(f"owners reach {max(owners)}, but class_names hold {len(class_names)}.")
            columns["owner_name"] = [class_names[owner] for owner in owners]
        frame: pandas.DataFrame = pd.DataFrame(columns, index=pd.RangeIndex(len(owners), name=_FILTER))
        return frame
    if values.ndim != 2:
        raise TypeError(f"expected a tensor [classes, filters] or owners [filters], but found {list(values.shape)}.")
    index = pd.Index(_labels(_CLASS, len(values), class_names), name=_CLASS)
    matrix: pandas.DataFrame = pd.DataFrame(
        values.detach().cpu().numpy(), index=index, columns=pd.RangeIndex(values.shape[1], name=_FILTER)
    )
    return matrix


def _of_fields(
    fields: Mapping[str, Tensor], axes: Mapping[str, tuple[str, ...]], class_names: Sequence[str] | None
) -> pandas.DataFrame:
    pd = _pandas()
    num_rows = min(len(axes[name]) for name in fields)
    row_axes = next(axes[name][:num_rows] for name in fields)
    shape = next(value.shape[:num_rows] for value in fields.values())
    labels = [_labels(axis, size, class_names) for axis, size in zip(row_axes, shape, strict=True)]
    columns: dict[str, Any] = {}
    for name, value in fields.items():
        table = value.detach().cpu().reshape(shape.numel(), -1).numpy()
        if value.ndim == num_rows:
            columns[name] = table[:, 0]
            continue
        its_labels = _labels(axes[name][num_rows], table.shape[1], class_names)
        columns |= {f"{name}_{label}": table[:, at] for at, label in enumerate(its_labels)}
    index = (
        pd.Index(labels[0], name=row_axes[0]) if num_rows == 1 else pd.MultiIndex.from_product(labels, names=row_axes)
    )
    frame: pandas.DataFrame = pd.DataFrame(columns, index=index)
    return frame
