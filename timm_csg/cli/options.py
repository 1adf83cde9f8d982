"""Options of the command line that commands share: those of ``TrainSettings``, and how values are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from timm_csg.cli.settings import DIGITS, TrainSettings, default_of, flag

CHECKPOINT = "checkpoint folder, folder of a timm-csg train run, Hub repository user/name, or timm model name"


def add_settings(parser: argparse.ArgumentParser, *, only: Collection[str] | None = None) -> None:
    """Give a parser one option for each field of ``TrainSettings``, or for those in ``only``."""
    for item in fields(TrainSettings):
        if only is None or item.name in only:
            kind = str(item.type).removesuffix(" | None")
            choices = item.metadata.get("choices")
            values: dict[str, Any]
            if kind == "bool":
                values = {"action": "store_true"}
            elif kind.startswith("list"):
                values = {"nargs": "+", "metavar": "NAME"}
            elif kind.startswith("tuple"):
                values = {"nargs": 2, "type": decimal, "metavar": ("LOW", "HIGH")}
            elif kind.startswith("dict"):
                values = {"nargs": "+", "action": "extend", "type": _pair, "metavar": "KEY=VALUE"}
            else:
                values = {"type": {"int": whole, "float": decimal}.get(kind, str), "choices": choices}
                values["metavar"] = None if choices else kind.upper()
            parser.add_argument(flag(item.name), dest=item.name, default=argparse.SUPPRESS, help=_help(item), **values)


def whole(text: str) -> int:
    """A whole number of the command line."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects a whole number, but found {text!r}") from None


def decimal(text: str) -> float:
    """A number of the command line."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects a number, but found {text!r}") from None


def path(text: str) -> Path:
    """A path of the command line; ``~`` is the home folder, also where no shell replaces it."""
    return Path(text).expanduser()


def names(text: str) -> list[str]:
    """Names with commas between them, such as ``cam,grad_cam``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def given_options(namespace: argparse.Namespace, known: Collection[str]) -> dict[str, Any]:
    """Those of the known options that were given; ``add_settings`` leaves no value for the others."""
    found = {name: getattr(namespace, name) for name in known if hasattr(namespace, name)}
    pairs = {item.name for item in fields(TrainSettings) if str(item.type).startswith("dict")}
    return {name: dict(value) if name in pairs else value for name, value in found.items()}


def _help(item: Field[Any]) -> str:
    text: str = item.metadata["help"]
    if "other" in item.metadata:
        defaults = [default_of(item, data) for data in (DIGITS, "")]
        digits, other = (" ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in defaults)
        return f"{text} (digits: {digits}; other data: {other})"
    return f"{text} (default: {item.default})" if item.default not in (None, False) else text


def _pair(text: str) -> tuple[str, Any]:
    """``key=value``; the value is read as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expects key=value, but found {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
