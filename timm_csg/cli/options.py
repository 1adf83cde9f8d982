"""Options of the command line that commands share: those of ``TrainSettings``, and ``--plugin``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm_csg.cli.settings import DEFAULTS, DIGITS_DEFAULTS, TrainSettings

DATA_OPTIONS = (
    "data", "data_dir", "val_split", "val_fraction", "val_seed", "dataset_download", "num_classes", "img_size",
    "batch_size", "device", "workers",
)  # fmt: skip


def add_settings(parser: argparse.ArgumentParser, *, only: Collection[str] | None = None) -> None:
    """Give a parser one option for each field of ``TrainSettings``, or for those in ``only``."""
    for item in fields(TrainSettings):
        if only is not None and item.name not in only:
            continue
        flag = "--" + item.name.replace("_", "-")
        kind = str(item.type).removesuffix(" | None")
        extra: dict[str, Any] = {"help": item.metadata["help"], "default": argparse.SUPPRESS}
        if item.name in DEFAULTS:
            extra["help"] += (
                f" (digits: {_words(DIGITS_DEFAULTS.get(item.name))}; other data: {_words(DEFAULTS[item.name])})"
            )
        elif item.default not in (None, False) and not isinstance(item.default, dict):
            extra["help"] += f" (default: {item.default})"
        if kind == "bool":
            extra["action"] = "store_true"
        elif kind.startswith("list"):
            extra.update(nargs="+", metavar="NAME")
        elif kind.startswith("tuple"):
            extra.update(nargs=2, type=float, metavar=("LOW", "HIGH"))
        elif kind.startswith("dict"):
            extra.update(nargs="+", action=_KeyValues, metavar="KEY=VALUE")
        else:
            extra["type"] = {"int": int, "float": float}.get(kind, str)
            extra["choices"] = item.metadata.get("choices")
            extra["metavar"] = None if extra["choices"] else kind.upper()
        parser.add_argument(flag, dest=item.name, **extra)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where the images are, those of ``timm-csg train``, and ``--plugin``."""
    add_settings(parser, only=DATA_OPTIONS)
    add_plugin_argument(parser)


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """``--plugin``, for ``import_plugins``."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file or module to import first, for example one that registers a model; may be repeated",
    )


def path(text: str) -> Path:
    """A path of the command line; ``~`` is the home folder, also where no shell replaces it."""
    return Path(text).expanduser()


def given_options(namespace: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Those of the options that were given on the command line; ``add_settings`` leaves no value for the others."""
    return {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class _KeyValues(argparse.Action):
    """key=value ... into a dictionary; values are read as JSON where they are JSON."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})
        for pair in values:
            key, equals, text = pair.partition("=")
            if not equals:
                parser.error(f"{option} expects key=value, but found {pair!r}")
            try:
                pairs[key] = json.loads(text)
            except json.JSONDecodeError:
                pairs[key] = text
        setattr(namespace, self.dest, pairs)
