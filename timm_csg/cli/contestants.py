"""Which models ``timm-csg evaluate`` compares, under which names, and on which data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_csg.cli.checkpoint_data import settings_of
from timm_csg.cli.checkpoints import check_local
from timm_csg.cli.runs import RunFolder, file_stem
from timm_csg.cli.settings import WHERE_OPTIONS, TrainSettings


def expand(checkpoints: Sequence[str]) -> dict[str, str]:
    """Short names for checkpoints; the folder of a ``timm-csg train`` run stands for all models in it.

    Args:
        checkpoints: As given.

    Returns:
        The checkpoint for each name, in order.

    Raises:
        ValueError: If none are given, one is given twice, or two would write the same files.
    """
    parts: list[tuple[str, ...]] = []
    found: list[str] = []
    for checkpoint in checkpoints:
        folder = Path(checkpoint.removeprefix("local-dir:")).expanduser()
        run = RunFolder(folder)
        for path in [str(model) for model in run.models()] if run.exists() else [checkpoint]:
            found.append(path)
            place = Path(path.removeprefix("local-dir:")).expanduser()
            is_folder = place.is_dir()
            whole = place.absolute().parts if is_folder else tuple(path.split("/"))
            parts.append(whole[:-1] if is_folder and whole[-1] == "model" else whole)
    if not found:
        raise ValueError("there is nothing to evaluate; name one or more checkpoints.")
    if len(set(found)) < len(found):
        raise ValueError(f"a checkpoint is named twice: {next(name for name in found if found.count(name) > 1)}.")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    named = {"/".join(part[-length:]): checkpoint for part, checkpoint in zip(parts, found, strict=True)}
    stems: dict[str, str] = {}
    for label in named:
        if (other := stems.setdefault(file_stem(label), label)) != label:
            raise ValueError(f"the tables of {other} and {label} would have the same file names; rename one folder.")
    return named


def settings_for(named: dict[str, str], data_options: dict[str, Any]) -> dict[str, TrainSettings]:
    """The settings of each checkpoint: its run's, with the options over them; all must name the same data.

    Raises:
        ValueError: If the checkpoints come from runs on different data, or none from a run, and no option says which
            to take.
        CheckpointError: If there is no such checkpoint, which then is the first thing to say.
    """
    runs = [run.settings() for checkpoint in named.values() if (run := RunFolder.of(checkpoint)) is not None]
    where = {tuple(getattr(run, name) for name in WHERE_OPTIONS) for run in runs}
    if "data" not in data_options:
        if len(where) > 1:
            listed = ", ".join(sorted({data for data, *_ in where}))
            raise ValueError(
                f"the checkpoints were trained on different data or parts of it ({listed}); choose with --data."
            )
        if not where:
            for checkpoint in named.values():
                check_local(checkpoint)
            likely = [name for name in named.values() if "/" in name and ":" not in name]  # not a name of timm's
            missing = [name for name in likely if not Path(name).expanduser().exists()]
            hint = f" ({missing[0]} is not a folder here, so it would be a repository of the Hub.)" if missing else ""
            raise ValueError(
                f"the checkpoints do not say what they were trained on; name the images with --data.{hint}"
            )
        known = dict(zip(WHERE_OPTIONS, next(iter(where)), strict=True))
        data_options = {name: value for name, value in known.items() if value is not None} | data_options
    return {label: settings_of(data_options, checkpoint) for label, checkpoint in named.items()}
