"""Saving: plain timm's files untouched, the mechanism beside them; ``timm_csg.loading`` reads them.

::

    model.safetensors                exactly plain timm's keys, as timm.create_model("local-dir:...") loads them
    config.json                      timm's, with one more root key "timm_csg"
    mechanism/timm_csg.safetensors   the mechanism, in a folder of its own: some readers take one safetensors file only
    metrics.json                     what was measured, if anything
    README.md                        model card; a README without our markers belongs to its author and is left alone
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from timm_csg import card, manifest
from timm_csg.building import check_buildable
from timm_csg.head import find_classifier
from timm_csg.hooks import check_saved
from timm_csg.labels import data_config, label_entries
from timm_csg.manifest import ASSETS, CONFIG, FORMAT, MECHANISM, METRICS, README, WEIGHTS
from timm_csg.mechanisms.base import Mechanism
from timm_csg.model import DifferentiatedModel, plain
from timm_csg.stage import find_stage
from timm_csg.tensors import Header, check_finite, merged_state, misfits, remedy, with_counters
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it if the block succeeds, and is removed if it fails.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("complete or absent")
        >>> target.read_text()
        'complete or absent'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files unreadable to others
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    label_descriptions: Mapping[str, str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Save a differentiated model so that both this package and plain timm can load it.

    The weights are written as plain timm writes them, contiguous and untied, whatever the memory format of the model;
    pruning, parametrizations and the shards of ``fully_shard`` are merged. What ``from_pretrained`` and plain timm
    could not load is refused before anything is written. A gate outside its feasible set (after a training without
    ``attach`` or ``after_step``, or averaged) is projected in the file, with a warning; the model stays as it is.

    Every file is written under a temporary name and then renamed, ``config.json`` with the others' checksums last.
    ``README.md`` becomes a model card; in one that exists only the block between our markers is replaced.
    For mechanisms that act at inference without targets, plain timm loads the weights but computes other logits.

    Args:
        model: A differentiated model, also wrapped in DistributedDataParallel or compiled. One that ``fully_shard`` has
            sharded is saved by all processes together; the first one writes.
        directory: Folder, created if it does not exist. Other files in it are left alone.
        class_names: One for each class, timm's ``label_names``; None: those that the model was loaded with, if any.
        label_descriptions: Longer names by class name; None: those that the model was loaded with, if any.
        preprocessing: How images were prepared when the model was measured, as ``timm.data.resolve_data_config``
            returns it: ``input_size``, ``crop_pct``, ``crop_mode``, ``mean``, ``std``, ``interpolation``. Whoever calls
            ``resolve_data_config`` for the loaded model gets this. None: what ``model.pretrained_cfg`` says.
        metrics: What was measured, written to ``metrics.json``; None: nothing was, and an earlier file goes.
        base_model: Where the weights came from before training, for example ``"timm/resnet18.a1_in1k"``.
        base_revision: Its commit.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is not differentiated, or the class names are not strings.
        ValueError: If ``metrics`` cannot be written as JSON, names or preprocessing do not suit the model, the
            weights are not finite, the directory is a file, or the weights could not be loaded again (quantised, with a
            LoRA adapter, reparameterized); the message says what to do before saving.
        OSError: If the folder cannot be written. An earlier save is then still intact, or, if it happened between two
            renames, loading it fails with a checksum error; never with a mixture of the two.
    """
    model = unwrap_model(model)
    if not isinstance(model, DifferentiatedModel):
        raise TypeError(
            f"expected a differentiated model, but found {type(model).__name__}; plain timm models have "
            "timm.models.save_for_hf."
        )
    directory = _folder(directory)
    labels = label_entries(model, class_names, label_descriptions)
    with plain(model):
        weights, config, made = _plain_parts(model, labels, preprocessing)
    mechanism_state = _mechanism_state(model, weights)
    if any(hasattr(value, "full_tensor") for value in model.parameters()) and torch.distributed.get_rank() != 0:
        return directory
    (directory / MECHANISM).parent.mkdir(parents=True, exist_ok=True)
    size = config["pretrained_cfg"]["input_size"]
    facts = card.Facts("", "", metrics, base_model, (), labels.get("label_names", ()), size, _layer(made))
    readme = _readme(model, directory, facts)
    texts = {} if readme is None else {README: readme}
    texts |= {} if metrics is None else {METRICS: _to_json(metrics)}
    with ExitStack() as stack:
        # Renamed in the reverse order of this list when the stack unwinds: config.json last.
        names = [CONFIG, *texts, MECHANISM, WEIGHTS]
        files = {name: stack.enter_context(replacing(directory / name)) for name in names}
        for name, text in texts.items():
            files[name].write_text(text, encoding="utf-8", newline="")
        safetensors.torch.save_file(mechanism_state, files[MECHANISM], metadata={"format": "pt"})
        safetensors.torch.save_file(weights, files[WEIGHTS], metadata={"format": "pt"})
        config["timm_csg"] = _own_entry(model.mechanism, files, base_model, base_revision)
        config["timm_csg"]["sha256"][CONFIG] = manifest.fingerprint(config)
        files[CONFIG].write_text(_to_json(config))
    if metrics is None:
        (directory / METRICS).unlink(missing_ok=True)  # it described other weights
    return directory


def _own_entry(
    mechanism: Mechanism, files: Mapping[str, Path], base_model: str | None, base_revision: str | None
) -> dict[str, Any]:
    """The entry ``"timm_csg"`` of ``config.json``, but for the config's own checksum."""
    return {
        "format": FORMAT,
        "mechanism": mechanism.name,
        "config": mechanism.config.to_dict(),
        "acts_without_targets": mechanism.acts_without_targets,
        "versions": {"timm_csg": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        "base_model": base_model,
        "base_revision": base_revision,
        "sha256": {name: manifest.sha256(files[name]) for name in (WEIGHTS, MECHANISM)},
    }


def save_plain(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Save a plain timm model as timm does, but also in channels_last, with tied or merged tensors, and atomically.

    Args:
        model: A timm model that is not differentiated.
        directory: Folder, created if it does not exist.
        class_names: As in ``save_pretrained``.
        preprocessing: As in ``save_pretrained``.

    Returns:
        The folder.

    Raises:
        ValueError: As ``save_pretrained``.
    """
    directory = _folder(directory)
    weights, config, _ = _plain_parts(model, label_entries(model, class_names), preprocessing)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / CONFIG) as config_file, replacing(directory / WEIGHTS) as weights_file:
        safetensors.torch.save_file(weights, weights_file, metadata={"format": "pt"})
        config_file.write_text(_to_json(config))
    return directory


def _folder(directory: str | os.PathLike[str]) -> Path:
    directory = Path(directory).expanduser()
    if directory.is_file():
        raise ValueError(f"{directory} is a file, but a checkpoint is a folder; choose another name.")
    return directory


def _plain_parts(
    model: nn.Module, labels: dict[str, Any], preprocessing: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any], nn.Module]:
    """Weights and config of a plain model, and the model without memory that the config makes, which they fit."""
    check_saved(model, find_classifier(model))
    weights = merged_state(model)
    check_finite({name: weights[name] for name, _ in model.named_parameters() if name in weights})
    with tempfile.TemporaryDirectory(prefix="timm_csg-") as folder:
        path = Path(folder, CONFIG)
        save_config_for_hf(model, str(path), model_config=labels, data_config=data_config(preprocessing))
        config: dict[str, Any] = json.loads(path.read_text())
        # transformers' TimmWrapper passes num_classes itself and fails on a second one; timm reads the root key.
        config.get("model_args", {}).pop("num_classes", None)
        for name in ("label_names", "label_descriptions"):  # timm reads those at the root, and puts them here
            config["pretrained_cfg"].pop(name, None)
        path.write_text(_to_json(config))
        architecture = config["architecture"]
        if not timm.is_model(architecture):
            _logger.warning("%s is not registered with timm: the model loads only where it is", architecture)
            return weights, config, model
        check_buildable(config, Path(CONFIG))
        with torch.device("meta"):
            made = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=config["num_classes"])
    return _checked(weights, made.state_dict(), architecture), config, made


def _checked(state: dict[str, Tensor], expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors in the order of the model that will load them; an error if it could not."""
    state = with_counters(state, expected)
    problems = misfits({key: Header.of(value) for key, value in state.items()}, expected)
    if problems:
        raise ValueError(
            f"the model no longer has the tensors of {what}, so it could not be loaded ({manifest.listed(problems)}); "
            f"{remedy(state)}."
        )
    return {key: state[key] for key in expected}


def _mechanism_state(model: DifferentiatedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mechanism's tensors, finite and in its feasible set; what it masks in the classifier is 0 in ``weights``."""
    mechanism = model.mechanism
    state = merged_state(mechanism)
    check_finite({f"mechanism.{key}": value for key, value in state.items()})
    like = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    made = type(mechanism)(
        mechanism.num_filters, mechanism.num_classes, mechanism.config, channels_last=mechanism.channels_last
    ).to(like)
    state = _checked(state, made.state_dict(), f"mechanism {mechanism.name!r}")
    made.load_state_dict(state)
    head = model.read_head()
    if head.weight is not None:
        classifier = find_classifier(model)
        name = next(name for name, module in model.named_modules() if module is classifier)
        head = head._replace(weight=weights[f"{name}.weight"].flatten(1), is_plain=True)  # they are merged
    if made.is_feasible(head):
        return state
    _logger.warning(
        "mechanism %r is outside its feasible set and is projected in the file: call attach(optimizer, model) before "
        "training, or after_step(model) after each step; averaged models need model.project_() before measuring",
        mechanism.name,
    )
    with torch.no_grad():
        made.project_(head)
    return merged_state(made)


def _readme(model: DifferentiatedModel, directory: Path, facts: card.Facts) -> str | None:
    """The model card with our block brought up to date; None if the README belongs to its author."""
    path, name = directory / README, directory.resolve().name
    figures = sorted(f"{ASSETS}/{file.name}" for file in (directory / ASSETS).glob("*.png"))
    facts = facts._replace(source=f"local-dir:{name}", figures=figures)
    try:
        previous = path.read_bytes().decode() if path.is_file() else None
        return card.model_card(model, facts, previous) if previous is None or card.has_block(previous) else None
    except ValueError as error:
        _logger.warning("%s is left as it is: %s", path, error)
        return None


def _layer(made: nn.Module) -> str:
    """The last stage in words; a card must not prevent saving."""
    try:
        return str(find_stage(made))
    except (TypeError, ValueError, RuntimeError) as error:
        _logger.warning("the model card does not describe the layer: %s", error)
        return f"{made.num_features} filters"


def _to_json(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected values that JSON can hold (finite numbers, strings, lists), but found: {error}"
        ) from error
