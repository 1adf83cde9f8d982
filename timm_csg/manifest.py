"""What the files of a checkpoint say about themselves, checked before anything is built from them.

A folder may come from anywhere. Everything here reads JSON and the headers of safetensors files only, and refuses what
no saved model would say: other formats, unknown names, absurd numbers, checksums that differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import timm
from torch import Tensor

from timm_csg.mechanisms.base import MechanismConfig, list_mechanisms, resolve_config
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
FORMAT = 1
WEIGHTS, MECHANISM, CONFIG, METRICS = "model.safetensors", "timm_csg.safetensors", "config.json", "metrics.json"
README, ASSETS = "README.md", "assets"
_OWN_KEYS = {
    "format", "mechanism", "config", "acts_without_targets", "versions", "base_model", "base_revision", "sha256",
}  # fmt: skip
_COMPUTES = ("architecture", "num_classes", "model_args", "pretrained_cfg")
_MAX_CONFIG_BYTES = 2**24
_MAX_ARGUMENT = 2**16
_MAX_VALUES = 2**17
_NO_MODEL = "does not describe a model that can be built"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, foreign, or does not fit the model; nothing has been changed."""


class NoMechanismError(CheckpointError):
    """A plain timm checkpoint, where one with a mechanism is wanted."""


class UnreadableConfigError(CheckpointError):
    """``config.json`` is not even JSON: damaged on its way, or by hand."""


class Header(NamedTuple):
    """What a safetensors file says about a tensor: its shape, and ``"F"`` float, ``"C"`` complex or ``"I"`` integer."""

    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, tensor: Tensor) -> Header:
        """That of a tensor in memory."""
        return cls(tuple(tensor.shape), "C" if tensor.is_complex() else "F" if tensor.is_floating_point() else "I")


def read_config(directory: Path, source: str | None = None) -> dict[str, Any]:
    """Read and check ``config.json``.

    Args:
        directory: The checkpoint's folder.
        source: What to tell timm to load instead where there is no mechanism; None: ``"local-dir:folder"``.

    Returns:
        The whole file; its entry ``"timm_csg"`` has a known format, mechanism, config and checksums.

    Raises:
        CheckpointError: If it is missing, damaged, foreign or of a newer format.
    """
    path = directory / CONFIG
    config = _read_json(path, directory)
    own = config.get("timm_csg") if isinstance(config, dict) else None
    if own is None:
        raise NoMechanismError(
            f"{path} is a checkpoint without a mechanism; load it with "
            f"timm.create_model('{source or f'local-dir:{directory}'}', pretrained=True) and call differentiate()."
        )
    if not isinstance(own, dict) or type(own.get("format")) is not int:
        raise CheckpointError(f"{path} is damaged: its entry 'timm_csg' has no format number.")
    if own["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {own['format']}, this version reads up to {FORMAT}; "
            f"pip install --upgrade 'timm_csg{_at_least(own)}'."
        )
    if own["format"] < 1:
        raise CheckpointError(f"{path} is damaged: there is no format {own['format']}.")
    checksums = own.get("sha256")
    if not isinstance(checksums, dict) or not all(
        isinstance(checksums.get(name), str) for name in (WEIGHTS, MECHANISM)
    ):
        raise CheckpointError(f"{path} is damaged: it lacks the checksums of {WEIGHTS} and {MECHANISM}.")
    if own.get("mechanism") not in list_mechanisms() or not isinstance(own.get("config"), dict):
        named = short(repr(own.get("mechanism")))
        raise CheckpointError(f"{path} names the mechanism {named}; known here are {', '.join(list_mechanisms())}.")
    result: dict[str, Any] = config
    return result


def read_metrics(directory: Path) -> dict[str, Any] | None:
    """What was measured, from ``metrics.json``; None if there is no such file.

    Raises:
        CheckpointError: If it is damaged.
    """
    if not (directory / METRICS).is_file():
        return None
    metrics = _read_json(directory / METRICS, directory)
    if not isinstance(metrics, dict):
        raise CheckpointError(f"{directory / METRICS} is damaged: it holds no dictionary.")
    return metrics


def _read_json(path: Path, directory: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {directory}: there is no {CONFIG} in it.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is damaged: {path.stat().st_size:,} bytes is too long for a config.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8 and numbers without end
        raise UnreadableConfigError(f"{path} is damaged, it is not JSON: {short(str(error))}.") from error


def _at_least(own: dict[str, Any]) -> str:
    version = _written_by(own)
    return "" if version is None else f">={'.'.join(map(str, version))}"


def _written_by(own: dict[str, Any]) -> tuple[int, ...] | None:
    versions = own.get("versions")
    return _version(versions.get("timm_csg")) if isinstance(versions, dict) else None


def _version(text: object) -> tuple[int, ...] | None:
    match = re.match(r"\d{1,4}(\.\d{1,4}){1,2}", text) if isinstance(text, str) else None
    return None if match is None else tuple(map(int, match[0].split(".")))


def short(value: object, length: int = 200) -> str:
    """A value from a foreign file, fit for an error message: printable, and cut where it is long."""
    text = value if isinstance(value, str) else repr(value)[: 2 * length]
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= length else text[:length] + "..."


def mechanism_config(own: dict[str, Any], path: Path) -> MechanismConfig:
    """The mechanism's options from a checked ``"timm_csg"`` entry.

    Unknown entries beside them are named in the log. Options unknown here are an error, unless a newer version of this
    package wrote them: a version that adds an option without which the model would compute something else also raises
    the format number, so that the others can be left out. That is said in the log.

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
        if unknown and written_by is not None and written_by > (_version(__version__) or ()):
            _logger.warning(
                "%s was written by timm_csg %s; ignored options that this version does not know: %s",
                path, ".".join(map(str, written_by)), short(", ".join(unknown)),
            )  # fmt: skip
            unknown = []
            own = {**own, "config": {key: value for key, value in own["config"].items() if key in valid}}
        return resolve_config(own["mechanism"], own["config"])[1]
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} {_NO_MODEL}: {short(str(error))}") from error


def check_buildable(config: dict[str, Any], path: Path) -> None:
    """Refuse architectures that are not registered and arguments that no saved model has, before timm sees them.

    Raises:
        CheckpointError: If the config would not build a model, or one that nobody can have saved.
    """
    architecture, num_classes = config.get("architecture"), config.get("num_classes")
    problem = None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        problem = (
            f"{short(repr(architecture))} is no architecture that timm {timm.__version__} knows; upgrade timm, or "
            "import the file that registers it"
        )
    elif type(num_classes) is not int or not 1 <= num_classes <= 2**24:
        problem = f"num_classes must be a whole number, 1 or more, but is {short(num_classes)}"
    for name in ("model_args", "pretrained_cfg"):
        values = config.get(name, {})
        if problem is None and not isinstance(values, dict):
            problem = f"{name} must be a dictionary, but is {short(values)}"
        elif problem is None:
            problem = _absurd(name, values)
    if problem is not None:
        raise CheckpointError(f"{path} {_NO_MODEL}: {problem}.")


def _absurd(name: str, values: Any) -> str | None:
    """What is wrong with a nest of JSON values, without recursion: numbers out of any range, or too many values."""
    pending, seen = [values], 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > _MAX_VALUES:
            return f"{name} has more than {_MAX_VALUES:,} values"
        if isinstance(value, (dict, list)):
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, (int, float)) and not abs(value) <= _MAX_ARGUMENT:
            return f"{name} holds the number {short(value, 40)}, but no model has arguments beyond {_MAX_ARGUMENT:,}"
    return None


def fingerprint(config: dict[str, Any]) -> str:
    """Checksum of the entries of ``config.json`` that decide what the model computes."""
    own = config["timm_csg"]
    parts = {name: config.get(name) for name in _COMPUTES} | {"mechanism": own["mechanism"], "config": own["config"]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_fingerprint(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that was changed after saving.

    Raises:
        CheckpointError: If the config has a checksum of its own, and it differs.
    """
    expected = config["timm_csg"]["sha256"].get(CONFIG)
    if expected is not None and expected != fingerprint(config):
        raise CheckpointError(
            f"{path} is damaged or was edited (the checksum of its {', '.join(_COMPUTES)} and mechanism differs); "
            "download again, or load what was saved and save_pretrained() it with the change."
        )


def check_files(directory: Path, own: dict[str, Any]) -> None:
    """Compare the two tensor files with their checksums.

    Raises:
        CheckpointError: If one is missing or differs.
    """
    for name in (WEIGHTS, MECHANISM):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint at {directory} is incomplete: {name} is missing.")
        if own["sha256"][name] != sha256(path):
            raise CheckpointError(
                f"{path} is damaged or was not saved together with {CONFIG} (its checksum differs); "
                "save or download again."
            )


def read_headers(path: Path) -> dict[str, Header]:
    """Shapes and kinds of the tensors in a safetensors file, without reading them.

    Raises:
        CheckpointError: If it is no safetensors file.
    """
    try:
        with safetensors.safe_open(path, "pt") as tensors:
            parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            kinds = {key: str(part.get_dtype()) for key, part in parts.items()}  # F32, BF16, C64, I8, U8, BOOL, ...
            kinds = {key: next((kind for kind in "FC" if kind in dtype), "I") for key, dtype in kinds.items()}
            return {key: Header(tuple(part.get_shape()), kinds[key]) for key, part in parts.items()}
    except Exception as error:  # the reader has an exception of its own for each kind of damage
        raise CheckpointError(f"{path} is damaged or not a checkpoint of tensors: {short(str(error))}") from error


def damaged_files(directory: Path) -> list[str]:
    """Names of the files that are missing or differ from their checksums; the config alone if it cannot tell.

    Example:
        >>> damaged_files(Path("/nowhere"))
        ['config.json']
    """
    try:
        config = read_config(directory)
        check_fingerprint(config, directory / CONFIG)
    except CheckpointError:
        return [CONFIG]
    found = [(name, directory / name, config["timm_csg"]["sha256"][name]) for name in (WEIGHTS, MECHANISM)]
    return [name for name, path, expected in found if not path.is_file() or sha256(path) != expected]


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
