"""The description of a checkpoint in its own files, checked before anything is built from them.

A folder may come from anywhere. Everything here reads JSON and the headers of safetensors files only, and refuses what
no saved model would say: other formats, unknown names, absurd numbers, checksums that differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from timm_csg.mechanisms.base import MechanismConfig
from timm_csg.mechanisms.registry import list_mechanisms, resolve_config
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
FORMAT = 1
WEIGHTS, MECHANISM = "model.safetensors", "mechanism/timm_csg.safetensors"
CONFIG, METRICS = "config.json", "metrics.json"
README, ASSETS = "README.md", "assets"
_OWN_KEYS = {
    "format", "mechanism", "config", "acts_without_targets", "versions", "base_model", "base_revision", "sha256",
}  # fmt: skip
_COMPUTES = ("architecture", "num_classes", "model_args", "pretrained_cfg")
_MAX_CONFIG_BYTES = 2**26  # names of 100,000 classes fit
NO_MODEL = "does not describe a model that can be built"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, foreign, or does not fit the model; nothing has been changed."""


class NoMechanismError(CheckpointError):
    """A plain timm checkpoint where one with a mechanism is expected."""


class UnreadableConfigError(CheckpointError):
    """``config.json`` is not valid JSON: damaged in transit, or by hand."""


@dataclass(frozen=True)
class Manifest:
    """What ``config.json`` of a checkpoint says; its entry ``"timm_csg"`` has a known format, mechanism and checksums.

    Attributes:
        folder: The checkpoint.
        config: The whole file.
    """

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, source: str | None = None) -> Manifest:
        """Read and check ``config.json``.

        Args:
            folder: The checkpoint.
            source: What to tell timm to load instead where there is no mechanism; None: ``"local-dir:folder"``.

        Raises:
            CheckpointError: If it is missing, damaged, foreign or of a newer format.
        """
        path = folder / CONFIG
        config = _read_json(path, folder)
        own = config.get("timm_csg") if isinstance(config, dict) else None
        if own is None and is_transformers_folder(folder):
            raise CheckpointError(
                f"{folder} was written by transformers: it holds weights, but not the options of a mechanism. Make the "
                "model as for training, timm_csg.differentiate(timm.create_model(...), ...), and call "
                f"timm_csg.load_checkpoint(model, '{folder}')."
            )
        if own is None and not (isinstance(config, dict) and isinstance(config.get("architecture"), str)):
            raise CheckpointError(f"{path} {NO_MODEL}: it names no architecture of timm, so another program wrote it.")
        if own is None:
            raise NoMechanismError(
                f"{path} is a checkpoint without a mechanism; load it with "
                f"timm.create_model('{source or f'local-dir:{folder}'}', pretrained=True) and call differentiate()."
            )
        _check_own(own, path)
        return cls(folder, config)

    @property
    def own(self) -> dict[str, Any]:
        """The entry ``"timm_csg"``."""
        own: dict[str, Any] = self.config["timm_csg"]
        return own

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / CONFIG

    def metrics(self) -> dict[str, Any] | None:
        """What was measured, from ``metrics.json``; None if there is no such file.

        Raises:
            CheckpointError: If it is damaged.
        """
        path = self.folder / METRICS
        if not path.is_file():
            return None
        metrics = _read_json(path, self.folder)
        if not isinstance(metrics, dict):
            raise CheckpointError(f"{path} is damaged: it is not a dictionary.")
        return metrics

    def check_fingerprint(self) -> None:
        """Refuse a config that was changed after saving.

        Raises:
            CheckpointError: If the config has a checksum of its own, and it differs.
        """
        expected = self.own["sha256"].get(CONFIG)
        if expected is not None and expected != fingerprint(self.config):
            raise CheckpointError(
                f"{self.path} is damaged or was edited (the checksum of its {', '.join(_COMPUTES)} and mechanism "
                "differs); download again, or load what was saved and save_pretrained() it with the change."
            )

    def damaged(self) -> list[str]:
        """Names of the tensor files that are missing or differ from their checksums."""
        files = {name: self.folder / name for name in (WEIGHTS, MECHANISM)}
        return [name for name, path in files.items() if not path.is_file() or sha256(path) != self.own["sha256"][name]]

    def check_files(self) -> None:
        """Compare the two tensor files with their checksums.

        Raises:
            CheckpointError: If one is missing or differs.
        """
        for name in self.damaged():
            if not (self.folder / name).is_file():
                raise CheckpointError(f"the checkpoint at {self.folder} is incomplete: {name} is missing.")
            raise CheckpointError(
                f"{self.folder / name} is damaged or was not saved together with {CONFIG} (its checksum differs); "
                "save or download again."
            )


def folder_named(name: str | os.PathLike[str]) -> Path:
    """The folder that a name stands for, whether it exists or not.

    Example:
        >>> folder_named("local-dir:runs/pets").as_posix()
        'runs/pets'
    """
    return Path(str(name).removeprefix("local-dir:")).expanduser()


def damaged_files(folder: Path) -> list[str]:
    """Names of the files that are missing or differ from their checksums; the config alone if it is damaged.

    Example:
        >>> damaged_files(Path("/nowhere"))
        ['config.json']
    """
    try:
        found = Manifest.read(folder)
        found.check_fingerprint()
    except CheckpointError:
        return [CONFIG]
    return found.damaged()


def is_transformers_folder(folder: Path) -> bool:
    """Whether transformers wrote a folder, such as ``checkpoint-500`` of its Trainer; it holds no options of ours."""
    path = folder / CONFIG
    config = _read_json(path, folder) if path.is_file() else None
    return isinstance(config, dict) and "timm_csg" not in config and "model_type" in config


def _check_own(own: Any, path: Path) -> None:
    if not isinstance(own, dict) or type(own.get("format")) is not int:
        raise CheckpointError(f"{path} is damaged: its entry 'timm_csg' has no format number.")
    if own["format"] > FORMAT:
        written_by = _written_by(own)
        raise CheckpointError(
            f"{path} has format {own['format']}, this version reads up to {FORMAT}; "
            f"pip install --upgrade 'timm_csg{'>=' if written_by else ''}{'.'.join(map(str, written_by))}'."
        )
    if own["format"] < 1:
        raise CheckpointError(f"{path} is damaged: {own['format']} is not a format.")
    checksums = own.get("sha256")
    if not isinstance(checksums, dict) or not all(
        isinstance(checksums.get(name), str) for name in (WEIGHTS, MECHANISM)
    ):
        raise CheckpointError(f"{path} is damaged: it lacks the checksums of {WEIGHTS} and {MECHANISM}.")
    if own.get("mechanism") not in list_mechanisms() or not isinstance(own.get("config"), dict):
        named = short(repr(own.get("mechanism")))
        raise CheckpointError(f"{path} names the mechanism {named}; known here are {', '.join(list_mechanisms())}.")


def _read_json(path: Path, directory: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {directory}: it has no {CONFIG}.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is damaged: {path.stat().st_size:,} bytes is too long for a config.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8 and numbers without end
        raise UnreadableConfigError(f"{path} is damaged, it is not valid JSON: {short(str(error))}.") from error


def _written_by(own: dict[str, Any]) -> tuple[int, ...]:
    """The version of this package that wrote an entry; empty if it does not say."""
    versions = own.get("versions")
    text = versions.get("timm_csg") if isinstance(versions, dict) else None
    match = re.match(r"\d{1,4}(\.\d{1,4}){1,2}", text) if isinstance(text, str) else None
    return () if match is None else tuple(map(int, match[0].split(".")))


def short(value: object, length: int = 200) -> str:
    """A value from a foreign file, fit for an error message: printable, and cut where it is long."""
    text = value if isinstance(value, str) else repr(value)[: 2 * length]
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= length else text[:length] + "..."


def listed(problems: Sequence[str]) -> str:
    """The first five of several problems, and how many more.

    Example:
        >>> listed(["missing a", "missing b"])
        'missing a; missing b'
    """
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(map(short, problems[:5])) + more


def mechanism_config(own: dict[str, Any], path: Path) -> MechanismConfig:
    """The mechanism's options from a checked ``"timm_csg"`` entry.

    Unknown entries beside them are named in the log. Options unknown here are an error, unless a newer version of this
    package wrote them: a version that adds an option without which the model would compute something else also raises
    the format number, so that the others can be left out. That is logged.

    Args:
        own: A checked entry.
        path: The file it comes from, for messages.

    Returns:
        The options.

    Raises:
        CheckpointError: If an option is unknown or out of its range.
    """
    entries = sorted(set(own) - _OWN_KEYS)
    if entries:
        _logger.warning("%s: ignored unknown entries of 'timm_csg': %s", path, short(", ".join(entries)))
    try:
        mechanism_class, _ = resolve_config(own["mechanism"], {})
        valid = {field.name for field in fields(mechanism_class.config_class)}
        unknown = sorted(set(own["config"]) - valid)
        written_by = _written_by(own)
        if unknown and written_by > _written_by({"versions": {"timm_csg": __version__}}):
            _logger.warning(
                "%s was written by timm_csg %s; ignored options that this version does not know: %s",
                path, ".".join(map(str, written_by)), short(", ".join(unknown)),
            )  # fmt: skip
            unknown = []
            own = {**own, "config": {key: value for key, value in own["config"].items() if key in valid}}
        return resolve_config(own["mechanism"], own["config"])[1]
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} {NO_MODEL}: {short(str(error))}") from error


def fingerprint(config: dict[str, Any]) -> str:
    """Checksum of the entries of ``config.json`` that decide what the model computes."""
    own = config["timm_csg"]
    parts = {name: config.get(name) for name in _COMPUTES} | {"mechanism": own["mechanism"], "config": own["config"]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
