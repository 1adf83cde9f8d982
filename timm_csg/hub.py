"""The Hugging Face Hub: push a differentiated model in one commit, load it anywhere, also offline afterwards."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from timm_csg import card
from timm_csg.checkpoint import load_directory, save_pretrained
from timm_csg.hub_errors import CONFLICTS, TRANSPORT_ERROR, TROUBLES, HubError, explained
from timm_csg.manifest import (
    ASSETS,
    CONFIG,
    MECHANISM,
    METRICS,
    README,
    WEIGHTS,
    CheckpointError,
    UnreadableConfigError,
    damaged_files,
    read_config,
    read_metrics,
)
from timm_csg.model import DifferentiatedModel
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.git)", re.ASCII)
_ATTEMPTS = 4


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
            with ``"@revision"``. A folder of that name goes first.
        revision: Branch, tag or commit; None: the one in ``name``, or ``main``.
        cache_dir: Where to keep downloads; None: the Hub's own cache.
        token: For private repositories; None: the one you logged in with.
        local_files_only: Use what is in the cache, without a request.
        force_download: Download again, even what is in the cache.

    Returns:
        The model; its standard and gated logits are bit for bit those of the saved one.

    Raises:
        CheckpointError: If it is no such checkpoint, a damaged one, or one of a newer format.
        HubError: If the Hub cannot be reached, refuses, or has no such repository, revision or file.

    Example:
        >>> import timm, timm_csg
        >>> folder = tempfile.mkdtemp()
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=10))
        >>> _ = timm_csg.save_pretrained(model, folder)
        >>> from_pretrained(f"local-dir:{folder}").mechanism.class_filter_matrix().shape
        torch.Size([10, 96])
    """
    repo_id, revision = _parse_name(name, revision)
    if repo_id is None:
        return load_directory(Path(str(name).removeprefix("local-dir:")))
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


def _parse_name(name: str | os.PathLike[str], revision: str | None) -> tuple[str | None, str | None]:
    """Repository and revision, or None for a folder."""
    text = str(name)
    prefix = next((prefix for prefix in ("hf-hub:", "hf_hub:") if text.startswith(prefix)), "")
    is_folder = not isinstance(name, str) or text.startswith("local-dir:") or (not prefix and Path(text).is_dir())
    if is_folder:
        if revision is not None:
            raise ValueError(f"{text} is a folder and has no revision; leave revision={revision!r} out.")
        return None, None
    repo_id, _, named = text.removeprefix(prefix).partition("@")
    if not _HUB_ID.fullmatch(repo_id):
        raise CheckpointError(
            f"no checkpoint at {text}: there is no such folder, and repositories are named 'user/name' or "
            "'hf-hub:user/name@revision'."
        )
    if named and revision not in (None, named):
        raise ValueError(f"{text} names the revision {named!r}, but revision={revision!r}; give one of them.")
    return repo_id, named or revision


def _download(repo_id: str, revision: str | None, source: str, *, force_download: bool, **options: Any) -> Path:
    """The folder in the cache with the three files of one commit; the config is checked before the rest is fetched."""
    options |= {"force_download": force_download, "library_name": "timm_csg", "library_version": __version__}
    with explained(f"load {source}"):
        try:
            config_file = Path(hf_hub_download(repo_id, CONFIG, revision=revision, **options))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            raise CheckpointError(
                f"{source} holds no model of timm or timm_csg: there is no {CONFIG} in it."
            ) from error
        folder = config_file.parent
        try:
            read_config(folder, source)
        except UnreadableConfigError:
            return folder  # the caller sees that, and downloads it again
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        for file in (MECHANISM, WEIGHTS):
            try:
                hf_hub_download(repo_id, file, revision=folder.name, **options)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):
                    raise
                raise CheckpointError(f"the checkpoint {source} is incomplete: {file} is missing.") from error
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    metrics: dict[str, Any] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    figures: Sequence[str | os.PathLike[str]] = (),
) -> CommitInfo:
    """Push a differentiated model to the Hub: weights, mechanism, config and model card in one commit, or not at all.

    The repository loads with ``from_pretrained`` here, with ``timm.create_model("hf-hub:user/name", pretrained=True)``
    in plain timm, and with ``TimmWrapperForImageClassification`` in transformers. For mechanisms that act at inference
    without targets, plain timm loads the weights but computes other logits; the card says so.

    A later push replaces the model and our block of the card; text and metadata of yours in the Hub's README stay.
    Pushing what is there already makes no commit. If somebody else pushes meanwhile, it starts again from theirs.

    Args:
        model: A differentiated model, also wrapped in DistributedDataParallel or compiled.
        repo_id: ``"user/name"``; made if it does not exist.
        private: Whether a new repository is private; None: as your account says.
        token: With write permission; None: the one you logged in with.
        revision: Branch to push to; None: ``main``.
        create_pr: Open a pull request instead.
        commit_message: First line of the commit.
        metrics: What was measured; ``"data"``, ``"seed"`` and ``"recipe"`` are named in the card. None: nothing
            was, and the numbers of an earlier push go.
        base_model: Where the weights came from before training, for example ``"timm/resnet18.a1_in1k"``.
        base_revision: Its commit.
        figures: PNG files for the card, such as a picture of the gate.

    Returns:
        The commit: ``oid``, ``commit_url`` and, with ``create_pr``, ``pr_url``.

    Raises:
        TypeError: If the model is not differentiated.
        ValueError: If ``metrics`` cannot be written as JSON, an argument is wrong, or the metadata of the README on the
            Hub cannot be read.
        HubError: If the Hub cannot be reached or refuses, saying why and what to do.
    """
    token = _check_push(repo_id, token, revision, create_pr=create_pr)
    with tempfile.TemporaryDirectory(prefix="timm_csg-") as folder, explained(f"push to {repo_id}"):
        for figure in map(Path, figures):
            if figure.suffix != ".png":
                raise ValueError(f"figures must be .png files, but one is {figure}.")
            (Path(folder) / ASSETS).mkdir(exist_ok=True)
            shutil.copyfile(figure, Path(folder) / ASSETS / figure.name.replace(" ", "_"))
        save_pretrained(model, folder, metrics=metrics, base_model=base_model, base_revision=base_revision)
        (Path(folder) / README).unlink(missing_ok=True)
        return push_folder(
            folder, repo_id, private=private, token=token, revision=revision, create_pr=create_pr,
            commit_message=commit_message,
        )  # fmt: skip


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> CommitInfo:
    """Push a folder made by ``save_pretrained``, after loading it to see that it is whole; see ``push_to_hub``.

    Only the checkpoint's own files go: config, weights, mechanism, ``metrics.json``, ``README.md``, ``assets/*.png``.
    The folder's README is used if the repository has none.

    Raises:
        CheckpointError: If the folder holds no whole checkpoint.
        HubError: If the Hub cannot be reached or refuses, saying why and what to do.
    """
    token = _check_push(repo_id, token, revision, create_pr=create_pr)
    folder = Path(folder)
    model = load_directory(folder)
    config = read_config(folder)
    files = {name: folder / name for name in (CONFIG, WEIGHTS, MECHANISM)}
    metrics = read_metrics(folder)
    files |= {} if metrics is None else {METRICS: folder / METRICS}
    figures = {f"{ASSETS}/{path.name}": path for path in sorted((folder / ASSETS).glob("*.png"))}
    base_model = config["timm_csg"].get("base_model")
    facts = card.Facts(repo_id.split("/")[1], f"hf-hub:{repo_id}", metrics, base_model, list(figures))
    api = HfApi(token=token, library_name="timm_csg", library_version=__version__)
    message = commit_message or f"Add {config['architecture']} with mechanism {config['timm_csg']['mechanism']}"
    with explained(f"push to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with explained(f"push to {repo_id}"):
                return _commit(
                    api, repo_id, model, facts, files | figures, message, folder / README, revision, create_pr
                )
        except HubError as error:
            lost = error.status is None and isinstance(error.__cause__, TRANSPORT_ERROR)
            again = error.status in CONFLICTS or ((lost or error.status in TROUBLES) and not create_pr)
            if not again or attempt == _ATTEMPTS:
                raise
            _logger.warning("%s; trying again (%d of %d)", error, attempt, _ATTEMPTS - 1)
            time.sleep(0.5 * 2**attempt)
    raise HubError(f"cannot push to {repo_id}.")


def _commit(
    api: HfApi, repo_id: str, model: nn.Module, facts: card.Facts, files: dict[str, Path], message: str,
    own_readme: Path, revision: str | None, create_pr: bool,
) -> CommitInfo:  # fmt: skip
    """One commit upon what is there now; refused with status 412 if that has changed before the commit arrives."""
    info = api.model_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in info.siblings or []}
    previous = None
    with tempfile.TemporaryDirectory(prefix="timm_csg-") as folder:
        if README in there:
            path = api.hf_hub_download(repo_id, README, revision=info.sha, local_dir=folder)
            try:
                previous = Path(path).read_bytes().decode()
            except UnicodeDecodeError as error:
                raise HubError(f"cannot push to {repo_id}: its {README} is not UTF-8; mend or remove it.") from error
    stale = {METRICS, *([] if previous is None else card.figures_in_block(previous))} & there - set(files)
    if previous is None and own_readme.is_file():
        previous = own_readme.read_text(encoding="utf-8")
    readme = card.model_card(model, facts, previous)
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationAdd(README, readme.encode())]
    return api.create_commit(
        repo_id,
        [*operations, *(CommitOperationDelete(name) for name in sorted(stale))],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )


def _check_push(repo_id: str, token: str | None, revision: str | None, *, create_pr: bool) -> str:
    if not isinstance(repo_id, str) or not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be 'user/name' (letters, digits, '-', '_', '.'), but is {repo_id!r}.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request goes to main; leave out revision={revision!r} or create_pr=True.")
    found = token or get_token()
    if not found:
        raise HubError(
            f"cannot push to {repo_id}: no token. Log in with 'hf auth login', set HF_TOKEN, or pass token=...; make "
            "one with write permission at https://huggingface.co/settings/tokens."
        )
    return found
