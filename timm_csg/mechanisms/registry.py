"""The mechanisms by name: registering them, and finding the class and config that a name or a config stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from timm_csg.checks import nearest
from timm_csg.mechanisms.base import Mechanism, MechanismConfig

_MECHANISMS: dict[str, type[Mechanism]] = {}
_MechanismT = TypeVar("_MechanismT", bound=type[Mechanism])


def register_mechanism(name: str, config_class: type[MechanismConfig]) -> Callable[[_MechanismT], _MechanismT]:
    """Class decorator: make a mechanism available as ``differentiate(model, mechanism=name)``.

    Args:
        name: The name, also written into checkpoints.
        config_class: Its config dataclass; ``differentiate``'s options are its fields.

    Returns:
        The decorator, which returns the class as it is.

    Raises:
        ValueError: If the name is taken by another class.
    """

    def register(mechanism_class: _MechanismT) -> _MechanismT:
        if name in _MECHANISMS:
            raise ValueError(f"mechanism {name!r} is already registered by {_MECHANISMS[name].__qualname__}.")
        mechanism_class.name = name
        mechanism_class.config_class = config_class
        _MECHANISMS[name] = mechanism_class
        return mechanism_class

    return register


def list_mechanisms() -> list[str]:
    """Names that ``differentiate(mechanism=...)`` accepts."""
    return sorted(_MECHANISMS)


def resolve_config(
    mechanism: str | MechanismConfig | Sequence[str | MechanismConfig], options: dict[str, Any]
) -> tuple[type[Mechanism], MechanismConfig]:
    """The mechanism class and validated config for a name with options, for a ready config, or for a list of several.

    Raises:
        ValueError: If the name is unknown, an option is unknown or out of its range, or options come with a config.
        TypeError: If ``mechanism`` is neither a name nor a config, nor a list of these.
    """
    if isinstance(mechanism, MechanismConfig):
        if options:
            raise ValueError(f"give either a {type(mechanism).__name__} or options, but got both: {sorted(options)}.")
        for mechanism_class in _MECHANISMS.values():
            if type(mechanism) is mechanism_class.config_class:
                return mechanism_class, mechanism
        raise ValueError(f"{type(mechanism).__name__} belongs to no registered mechanism ({list_mechanisms()}).")
    if isinstance(mechanism, (list, tuple)):
        if options:
            raise ValueError(f"options of several mechanisms belong in their configs, but found {sorted(options)}.")
        mechanism, options = "chain", {"members": mechanism}
    if not isinstance(mechanism, str):
        raise TypeError(
            f"mechanism must be a name ({', '.join(list_mechanisms())}), a config, or a list of these, but is "
            f"{type(mechanism)}."
        )
    if mechanism not in _MECHANISMS:
        raise ValueError(
            f"unknown mechanism {mechanism!r}; known are {', '.join(list_mechanisms())}."
            f"{nearest(mechanism, list_mechanisms())}"
        )
    mechanism_class = _MECHANISMS[mechanism]
    return mechanism_class, mechanism_class.config_class.from_dict(options)
