"""``timm-csg push``: what it uploads, prints and refuses."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import timm_csg
from timm_csg.cli import _parser, main


def test_folder_arrives_with_its_readme_metrics_and_figures(regular_hub, saved, model, capsys):
    (saved / "assets").mkdir()
    (saved / "assets" / "gate.png").write_bytes(b"\x89PNG")
    timm_csg.save_pretrained(model, saved, metrics={"accuracy": 0.5}, base_model="timm/x")
    (saved / "README.md").write_text((saved / "README.md").read_text() + "mine\n")
    (saved / "state.pth").write_bytes(b"not for the Hub")
    assert main(["push", str(saved), "user/tiny", "--private", "--message", "first"]) == 0
    repo = regular_hub.repos["user/tiny"]
    files = repo.files()
    assert repo.private
    assert repo.messages[-1] == "first"
    tensors = ["model.safetensors", "mechanism/timm_csg.safetensors"]
    assert set(files) == {".gitattributes", "README.md", "assets/gate.png", "config.json", "metrics.json", *tensors}
    readme = files["README.md"].decode()
    assert 'from_pretrained("hf-hub:user/tiny")' in readme
    assert readme.endswith("mine\n")
    assert "base_model: timm/x" in readme
    assert capsys.readouterr().out.strip() == f"{regular_hub.endpoint}/user/tiny/commit/{repo.branches['main']}"


def test_pull_request_is_what_is_printed(regular_hub, saved, capsys):
    regular_hub.add_repo("user/tiny")
    assert main(["push", str(saved), "user/tiny", "--create-pr"]) == 0
    assert capsys.readouterr().out.strip().endswith("/user/tiny/discussions/1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "user/tiny"], "no checkpoint at nowhere"),
        (["RUN", "user/tiny"], "is a run, its model is in"),
        (["FOLDER", "tiny"], "repo_id must be 'user/name'"),
        (["FOLDER", "user/tiny", "--token", "hf_wrong"], "the Hub does not accept the token"),
        (["FOLDER", "other/tiny"], "the token lacks the permission"),
        (["FOLDER", "user/tiny", "--create-pr", "--revision", "x"], "a pull request goes to main"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(regular_hub, saved, capsys, arguments, words):
    shutil.copytree(saved, saved.parent / "run" / "model")
    folders = {"FOLDER": str(saved), "RUN": str(saved.parent / "run")}
    arguments = [folders.get(argument, argument) for argument in arguments]
    assert main(["push", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.startswith("timm-csg push: ")
    assert regular_hub.repos == {}


def test_commands_in_the_documentation_parse():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "share-a-model.md").read_text(encoding="utf-8")
    commands = re.findall(r"^timm-csg (push .*)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        assert _parser().parse_args(shlex.split(command)).command == "push"
