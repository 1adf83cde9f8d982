"""``timm-csg push``: a saved model to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from rich.console import Console

from timm_csg.hub import push_folder
from timm_csg.manifest import CONFIG


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", type=Path, help="folder with the model, for example runs/digits-test_resnet-1/model")
    parser.add_argument("repo_id", metavar="user/name", help="repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing to main")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--token", help="with write permission (default: HF_TOKEN, or that of 'hf auth login')")


def push(namespace: argparse.Namespace, console: Console, *, quiet: bool) -> int:
    """Push, and say where it went.

    Raises:
        ValueError: If the folder is a run, not a model.
        CheckpointError: If the folder holds no whole checkpoint.
        HubError: If the Hub cannot be reached or refuses.
    """
    if quiet:
        disable_progress_bars()
    if not (namespace.folder / CONFIG).is_file() and (namespace.folder / "model" / CONFIG).is_file():
        raise ValueError(f"{namespace.folder} is a run, its model is in {namespace.folder / 'model'}; push that.")
    commit = push_folder(
        namespace.folder,
        namespace.repo_id,
        private=namespace.private,
        token=namespace.token,
        revision=namespace.revision,
        create_pr=namespace.create_pr,
        commit_message=namespace.message,
    )
    console.print(commit.pr_url or commit.commit_url, soft_wrap=True, highlight=False)
    return 0
