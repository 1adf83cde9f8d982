"""What a model's config holds besides its architecture: names of classes, and how images are prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_model_input_config
from torch import nn

from timm_csg.checks import nearest, whole


def _input_size(size: Any) -> tuple[int, ...]:
    found = tuple(map(int, size))
    if len(found) != 3 or min(found) < 1:
        raise ValueError(f"input_size must be channels, height and width, each 1 or more, but is {size!r}.")
    return found


_PREPROCESSING: dict[str, Callable[[Any], Any]] = {
    "input_size": _input_size,
    "interpolation": str,
    "mean": lambda values: tuple(map(float, values)),
    "std": lambda values: tuple(map(float, values)),
    "crop_pct": float,
    "crop_mode": str,
}


def class_names(model: nn.Module) -> list[str] | None:
    """Names of a model's classes, in the order of its logits; None if it has none, or those of other classes.

    Args:
        model: A timm model, differentiated or not. ``from_pretrained`` and ``timm.create_model`` put the names of a
            checkpoint into its ``pretrained_cfg``.

    Returns:
        One name for each class.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> model.pretrained_cfg["label_names"] = ["cat", "dog"]
        >>> class_names(model)
        ['cat', 'dog']
    """
    count = getattr(model, "num_classes", None)
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if isinstance(names, Mapping):  # timm also takes a name for each index, as strings in JSON
        by_index = {str(index): name for index, name in names.items()}
        names = [by_index.get(str(index)) for index in range(len(by_index))]
    if not isinstance(names, (list, tuple)) or len(names) != count or None in names:
        return None
    return [str(name) for name in names]


def class_index(label: str | int, names: Sequence[str]) -> int:
    """The index of a class that is named, or whose number is given.

    Args:
        label: Its name, or its index as a number or text; a name goes first.
        names: The names of all classes, in order.

    Raises:
        ValueError: If there is no such class.

    Example:
        >>> class_index("dog", ["cat", "dog"]), class_index(0, ["cat", "dog"]), class_index("1", ["cat", "dog"])
        (1, 0, 1)
    """
    number = whole(label)
    if number is not None and 0 <= number < len(names):
        return number
    text = str(label)
    if number is None and text in names:
        return list(names).index(text)
    if number is None and text.isdecimal() and int(text) < len(names):
        return int(text)
    listed = f"; the model has {', '.join(names[:12])}{', ...' * (len(names) > 12)}."
    question = nearest(text, names)
    raise ValueError(f"there is no class {text!r}{'.' + question if question else listed}")


def label_entries(
    model: nn.Module, names: Sequence[str] | None = None, descriptions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The entries of ``config.json`` about classes: ``label_names`` and ``label_descriptions``, as far as known.

    Args:
        model: The model.
        names: One for each class; None: those that the model has already.
        descriptions: Longer names by name; None: those that the model has already, of these names.

    Raises:
        ValueError: If there is not one name for each class, or a description belongs to no class.
        TypeError: If the names are not a sequence of strings.
    """
    count = int(model.num_classes)  # type: ignore[arg-type]
    if names is None:
        names = class_names(model)
    elif isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be a sequence of strings, one for each class, but is {names!r}.")
    elif len(names) != count:
        raise ValueError(f"class_names must hold one name for each of the {count} classes, but holds {len(names)}.")
    if names is None:
        if descriptions:
            raise ValueError("label_descriptions describe classes by name; pass class_names=... as well.")
        return {}
    if descriptions is None:
        found = (getattr(model, "pretrained_cfg", None) or {}).get("label_descriptions")
        found = found if isinstance(found, Mapping) else {}
        descriptions = {name: str(found[name]) for name in names if name in found}
    unknown = sorted(set(descriptions) - set(names))
    if unknown:
        raise ValueError(f"label_descriptions describe {', '.join(unknown[:8])}, which class_names do not hold.")
    return {"label_names": list(names)} | ({"label_descriptions": dict(descriptions)} if descriptions else {})


def data_config(preprocessing: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A data config with numbers that JSON can hold, for ``timm.models._hub.save_config_for_hf``.

    Args:
        preprocessing: What ``timm.data.resolve_data_config`` returns, or a part of it; None: nothing is known.

    Raises:
        ValueError: If it has other entries, or an input size that is none.

    Example:
        >>> data_config({"input_size": [3, 32, 32], "crop_pct": 1})
        {'input_size': (3, 32, 32), 'crop_pct': 1.0}
    """
    if preprocessing is None:
        return None
    unknown = sorted(set(preprocessing) - set(_PREPROCESSING))
    if unknown:
        raise ValueError(
            f"preprocessing has no entry {', '.join(unknown)}; pass what timm.data.resolve_data_config returns: "
            f"{', '.join(_PREPROCESSING)}."
        )
    return {key: _PREPROCESSING[key](value) for key, value in preprocessing.items() if value is not None}


def input_config(model: Any) -> dict[str, Any]:
    """How a model wants its pictures: input size, normalisation, interpolation and crop, for ``create_transform``.

    Args:
        model: A timm model.

    Returns:
        What ``timm.data.resolve_data_config`` makes of the model's ``pretrained_cfg``.

    Example:
        >>> import timm
        >>> config = input_config(timm.create_model("test_resnet", in_chans=1))
        >>> config["input_size"], config["mean"]
        ((1, 160, 160), (0.5,))
    """
    size = tuple(get_model_input_config(model)["input_size"])
    return resolved_config(model.pretrained_cfg, size[0], input_size=size)


def resolved_config(pretrained_cfg: Mapping[str, Any], in_chans: int, **args: Any) -> dict[str, Any]:
    """``timm.data.resolve_data_config`` for images of so many channels.

    Args:
        pretrained_cfg: Of a timm model.
        in_chans: Channels; grey images get a mean and deviation of 0.5 where the model's are still those of colours.
        **args: ``input_size``, ``img_size``, ``crop_pct``, ...: over those of ``pretrained_cfg``.

    Returns:
        ``input_size``, ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``.
    """
    args["in_chans"] = in_chans
    if in_chans == 1 and len(pretrained_cfg.get("mean", ())) != 1:
        args |= {"mean": (0.5,), "std": (0.5,)}
    config: dict[str, Any] = resolve_data_config(args, pretrained_cfg=pretrained_cfg)
    return config
