"""Loading from the Hugging Face Hub, also offline afterwards; ``timm_csg.pushing`` pushes."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from timm_csg.hub_errors import explained
from timm_csg.loading import load_directory
from timm_csg.manifest import (
    CONFIG,
    MECHANISM,
    WEIGHTS,
    CheckpointError,
    Manifest,
    UnreadableConfigError,
    damaged_files,
    folder_named,
)
from timm_csg.model import DifferentiatedModel
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.git)", re.ASCII)


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> DifferentiatedModel:
    """Load a differentiated model from a folder or from the Hub, in eval mode, on the CPU.

    Loading is strict, runs no code of a repository, and reads tensors from safetensors files only. From the Hub, the
    files of one commit are downloaded into the cache that all Hub libraries share; afterwards only a change of the
    repository is asked for, and nothing with ``local_files_only`` or ``HF_HUB_OFFLINE=1``.

    Args:
        name: A folder, also as ``"local-dir:folder"``; or a repository: ``"user/name"``, ``"hf-hub:user/name"``, either
            with ``"@revision"``. A folder of that name takes precedence.
        revision: Branch, tag or commit; None: the one in ``name``, or ``main``.
        cache_dir: Where to keep downloads; None: the Hub's own cache.
        token: For private repositories; None: the one you logged in with.
        local_files_only: Use what is in the cache, without a request.
        force_download: Download again, even what is in the cache.

    Returns:
        The model; its standard and gated logits are bit for bit those of the saved one.

    Raises:
        CheckpointError: If it is not such a checkpoint, is damaged, or has a newer format.
        HubError: If the Hub cannot be reached, refuses, or has no such repository, revision or file.

    Example:
        >>> import tempfile, timm, timm_csg
        >>> folder = tempfile.mkdtemp()
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=10))
        >>> _ = timm_csg.save_pretrained(model, folder)
        >>> from_pretrained(f"local-dir:{folder}").mechanism.class_filter_matrix().shape
        torch.Size([10, 96])
    """
    repo_id, revision = parse_name(name, revision)
    if repo_id is None:
        folder = folder_named(name)
        if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
            raise CheckpointError(f"{folder} is the folder of a run; its model is in {folder / 'model'}: load that.")
        return load_directory(folder)
    options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    source = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    folder = _download(repo_id, revision, source, force_download=force_download, **options)
    try:
        model = load_directory(folder, source=source)
    except CheckpointError as error:
        damaged = damaged_files(folder)
        if not damaged or local_files_only or force_download:
            raise CheckpointError(f"{source}: {error}") from error
        _logger.warning("%s: downloading %s again, the cached copy is damaged", source, ", ".join(damaged))
        folder = _download(repo_id, folder.name, source, force_download=True, **options)
        try:
            model = load_directory(folder, source=source)
        except CheckpointError as again:
            raise CheckpointError(f"{source} itself is damaged, also after downloading it again: {again}") from again
    _logger.info("loaded %s at commit %s", source, folder.name)
    return model


def parse_name(name: str | os.PathLike[str], revision: str | None) -> tuple[str | None, str | None]:
    """Repository and revision, or None for a folder.

    Args:
        name: See ``from_pretrained``.
        revision: The one that was given beside the name, if any.

    Returns:
        ``"user/name"`` and its revision, each None if not given; twice None for a folder.

    Raises:
        CheckpointError: If it is neither a folder nor a name for a repository.
        ValueError: If a folder has a revision, or there are two.
    """
    text = str(name)
    prefix = next((prefix for prefix in ("hf-hub:", "hf_hub:") if text.startswith(prefix)), "")
    is_folder = (
        not isinstance(name, str) or text.startswith("local-dir:") or (not prefix and Path(text).expanduser().is_dir())
    )
    if is_folder:
        if revision is not None:
            raise ValueError(f"{text} is a folder and has no revisions; leave out revision={revision!r}.")
        return None, None
    if Path(text).suffix == ".json" and Path(text).expanduser().is_file():
        raise CheckpointError(f"{text} is a file in a checkpoint or run; name the folder, {Path(text).parent}.")
    if Path(text).expanduser().is_file():
        raise CheckpointError(
            f"{text} is a file of weights, which does not describe the model or its mechanism; create the model and "
            f"its mechanism as for training, call timm_csg.load_checkpoint(model, {text!r}), and save a folder with "
            "timm_csg.save_pretrained(model, 'folder')."
        )
    repo_id, _, named = text.removeprefix(prefix).partition("@")
    if not HUB_ID.fullmatch(repo_id):
        if timm.is_model(repo_id.partition(".")[0]):
            raise CheckpointError(
                f"{repo_id} is a model of timm, which no mechanism was trained with; make it with "
                f"timm_csg.differentiate(timm.create_model({repo_id!r}, pretrained=True)) and fine-tune it."
            )
        raise CheckpointError(
            f"no checkpoint at {text}: the folder does not exist, and repositories are named 'user/name' or "
            "'hf-hub:user/name@revision'."
        )
    if named and revision not in (None, named):
        raise ValueError(f"{text} names the revision {named!r}, but revision={revision!r}; give one of them.")
    return repo_id, named or revision


def _download(repo_id: str, revision: str | None, source: str, *, force_download: bool, **options: Any) -> Path:
    """The folder in the cache with the three files of one commit; the config is checked before the rest is fetched."""
    options |= {"force_download": force_download, "library_name": "timm_csg", "library_version": __version__}
    with explained(f"load {source}", repo_id):
        missing = f"{source} holds no model of timm or timm_csg: it has no {CONFIG}."
        folder = _download_file(repo_id, CONFIG, missing, revision=revision, **options).parent
        try:
            Manifest.read(folder, source)
        except UnreadableConfigError:
            return folder  # the caller sees that, and downloads it again
        except CheckpointError as error:
            raise type(error)(f"{source}: {error}") from error
        for file in (MECHANISM, WEIGHTS):
            missing = f"the checkpoint {source} is incomplete: {file} is missing."
            _download_file(repo_id, file, missing, revision=folder.name, **options)
    return folder


def _download_file(repo_id: str, file: str, missing: str, **options: Any) -> Path:
    try:
        return Path(hf_hub_download(repo_id, file, **options))
    except LocalEntryNotFoundError:  # nobody was asked whether it exists
        raise
    except EntryNotFoundError as error:
        raise CheckpointError(missing) from error
