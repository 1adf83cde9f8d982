"""``timm-csg push``: the command."""

from __future__ import annotations

import argparse

from timm_csg.cli.options import path
from timm_csg.cli.terminal import make_console

SUMMARY = "push a saved model to the Hugging Face Hub"
DESCRIPTION = "Push a folder made by timm-csg train or save_pretrained to the Hugging Face Hub, in one commit."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", type=path, help="checkpoint folder, or folder of a timm-csg train run")
    parser.add_argument("repo_id", metavar="user/name", help="repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing to main")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--token", help="token with write permission (default: HF_TOKEN, or that of 'hf auth login')")


def run(args: argparse.Namespace) -> int:
    """Push, and print the address.

    Raises:
        CheckpointError: If the folder holds no complete checkpoint.
        HubError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from timm_csg.cli.checkpoints import checkpoint_folder
    from timm_csg.pushing import push_folder

    console = make_console()
    if args.quiet or not console.is_terminal:
        disable_progress_bars()
    commit = push_folder(
        checkpoint_folder(args.folder) or args.folder,
        args.repo_id,
        private=args.private,
        token=args.token,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    console.print(commit.pr_url or commit.commit_url, soft_wrap=True)
    return 0
