"""Pushing to the Hugging Face Hub: a whole checkpoint in one commit."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from timm.utils.model import unwrap_model
from torch import nn

from timm_csg import card
from timm_csg.checkpoint import save_pretrained
from timm_csg.hub import HUB_ID
from timm_csg.hub_errors import CONFLICTS, TRANSPORT_ERROR, TROUBLES, HubError, explained
from timm_csg.loading import load_directory
from timm_csg.manifest import ASSETS, CONFIG, MECHANISM, METRICS, README, WEIGHTS, Manifest
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
_ATTEMPTS = 4


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    class_names: Sequence[str] | None = None,
    label_descriptions: Mapping[str, str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
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
    Pushing an unchanged model makes no commit. If somebody else pushes in the meantime, the push is retried on theirs.

    Args:
        model: A differentiated model, also wrapped in DistributedDataParallel or compiled.
        repo_id: ``"user/name"``; created if it does not exist.
        private: Whether a new repository is private; None: your account's default.
        token: With write permission; None: the one you logged in with.
        revision: Branch to push to; None: ``main``.
        create_pr: Open a pull request instead.
        commit_message: First line of the commit.
        class_names: See ``save_pretrained``.
        label_descriptions: See ``save_pretrained``.
        preprocessing: See ``save_pretrained``.
        metrics: What was measured; ``"data"``, ``"seed"`` and ``"recipe"`` are named in the card. None: nothing
            was, and the numbers of an earlier push are removed.
        base_model: Where the weights came from before training, for example ``"timm/resnet18.a1_in1k"``.
        base_revision: Its commit.
        figures: PNG files for the card, such as a picture of the gate.

    Returns:
        The commit: ``oid``, ``commit_url`` and, with ``create_pr``, ``pr_url``.

    Raises:
        TypeError: If the model is not differentiated.
        ValueError: As ``save_pretrained``; or if an argument is wrong, or the metadata of the README on the Hub cannot
            be read.
        HubError: If the Hub cannot be reached or refuses, saying why and what to do.
    """
    token = _check_push(repo_id, token, revision, create_pr=create_pr)
    with tempfile.TemporaryDirectory(prefix="timm_csg-") as folder, explained(f"push to {repo_id}"):
        for figure in map(Path, figures):
            if figure.suffix != ".png":
                raise ValueError(f"figures must be .png files, but one is {figure}.")
            (Path(folder) / ASSETS).mkdir(exist_ok=True)
            shutil.copyfile(figure, Path(folder) / ASSETS / figure.name.replace(" ", "_"))
        save_pretrained(
            model, folder, class_names=class_names, label_descriptions=label_descriptions, preprocessing=preprocessing,
            metrics=metrics, base_model=base_model, base_revision=base_revision,
        )  # fmt: skip
        (Path(folder) / README).unlink(missing_ok=True)
        push = _Push(repo_id, token, revision, create_pr, commit_message)
        return push.send(unwrap_model(model), Path(folder), private=private)


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
    """Push a folder made by ``save_pretrained``, after checking that it loads; see ``push_to_hub``.

    Only the checkpoint's own files are pushed: config, weights, mechanism, ``metrics.json``, ``README.md`` and
    ``assets/*.png``. The folder's README is used if the repository has none.

    Args:
        folder: The checkpoint.
        repo_id: See ``push_to_hub``, as all that follow.
        private: Whether a new repository is private.
        token: With write permission.
        revision: Branch to push to.
        create_pr: Open a pull request instead.
        commit_message: First line of the commit.

    Returns:
        The commit, see ``push_to_hub``.

    Raises:
        CheckpointError: If the folder holds no complete checkpoint.
        HubError: If the Hub cannot be reached or refuses, saying why and what to do.
    """
    token = _check_push(repo_id, token, revision, create_pr=create_pr)
    push = _Push(repo_id, token, revision, create_pr, commit_message)
    folder = Path(folder).expanduser()
    return push.send(load_directory(folder), folder, private=private)


@dataclass(frozen=True)
class _Push:
    """A push of a checkpoint folder: where to and how."""

    repo_id: str
    token: str
    revision: str | None
    create_pr: bool
    message: str | None

    def send(self, model: nn.Module, folder: Path, *, private: bool | None) -> CommitInfo:
        """Create the repository and commit the folder; retried if somebody else pushed in the meantime.

        Args:
            model: What the folder holds, for the model card.
            folder: Made by ``save_pretrained``.
            private: Whether a new repository is private.
        """
        found = Manifest.read(folder)
        metrics = found.metrics()
        names = [CONFIG, WEIGHTS, MECHANISM, *([] if metrics is None else [METRICS])]
        figures = [f"{ASSETS}/{path.name}" for path in sorted((folder / ASSETS).glob("*.png"))]
        facts = card.Facts(
            self.repo_id.split("/")[1], f"hf-hub:{self.repo_id}", metrics, found.own.get("base_model"), figures,
            found.config.get("label_names", ()), found.config["pretrained_cfg"]["input_size"],
        )  # fmt: skip
        message = self.message or f"Add {found.config['architecture']} with mechanism {found.own['mechanism']}"
        api = HfApi(token=self.token, library_name="timm_csg", library_version=__version__)
        with explained(f"push to {self.repo_id}"):
            api.create_repo(self.repo_id, private=private, exist_ok=True)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with explained(f"push to {self.repo_id}"):
                    return self._commit(api, model, facts, folder, [*names, *figures], message)
            except HubError as error:
                lost = error.status is None and isinstance(error.__cause__, TRANSPORT_ERROR)
                again = error.status in CONFLICTS or ((lost or error.status in TROUBLES) and not self.create_pr)
                if not again or attempt == _ATTEMPTS:
                    raise
                _logger.warning("%s; trying again (%d of %d)", error, attempt, _ATTEMPTS - 1)
                time.sleep(0.5 * 2**attempt)
        raise HubError(f"cannot push to {self.repo_id}.")

    def _commit(
        self, api: HfApi, model: nn.Module, facts: card.Facts, folder: Path, names: list[str], message: str
    ) -> CommitInfo:
        """One commit on top of the current one; the Hub refuses it with status 412 if that has changed."""
        info = api.model_info(self.repo_id, revision=self.revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        previous = self._readme_on_hub(api, info.sha) if README in there else None
        stale = {METRICS, *([] if previous is None else card.figures_in_block(previous))} & there - set(names)
        if previous is None and (folder / README).is_file():
            previous = (folder / README).read_text(encoding="utf-8")
        readme = card.model_card(model, facts, previous).encode()
        return api.create_commit(
            self.repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                CommitOperationAdd(README, readme),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=info.sha,
        )

    def _readme_on_hub(self, api: HfApi, commit: str | None) -> str:
        with tempfile.TemporaryDirectory(prefix="timm_csg-") as folder:
            path = api.hf_hub_download(self.repo_id, README, revision=commit, local_dir=folder)
            try:
                return Path(path).read_bytes().decode()
            except UnicodeDecodeError as error:
                raise HubError(
                    f"cannot push to {self.repo_id}: its {README} is not UTF-8; fix or remove it."
                ) from error


def _check_push(repo_id: str, token: str | None, revision: str | None, *, create_pr: bool) -> str:
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be 'user/name' (letters, digits, '-', '_', '.'), but is {repo_id!r}.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request goes to main; leave out revision={revision!r} or create_pr=True.")
    found = token or get_token()
    if not found:
        raise HubError(
            f"cannot push to {repo_id}: no token. Log in with 'hf auth login', set HF_TOKEN, or pass token=...; "
            "create one with write permission at https://huggingface.co/settings/tokens."
        )
    return found
