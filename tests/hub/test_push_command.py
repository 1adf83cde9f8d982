"""``timm-csg push``: what it uploads, prints and refuses."""

import logging
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


def test_of_a_run_its_model_is_pushed(regular_hub, saved):
    shutil.copytree(saved, saved.parent / "run" / "model")
    assert main(["push", str(saved.parent / "run"), "user/tiny"]) == 0
    weights = regular_hub.repos["user/tiny"].files()["model.safetensors"]
    assert weights == (saved / "model.safetensors").read_bytes()


def test_pull_request_is_what_is_printed(regular_hub, saved, capsys):
    regular_hub.add_repo("user/tiny")
    assert main(["push", str(saved), "user/tiny", "--create-pr"]) == 0
    assert capsys.readouterr().out.strip().endswith("/user/tiny/discussions/1")


def test_unchanged_push_is_told_once(regular_hub, saved, capsys, monkeypatch):
    logger, ours, told = logging.getLogger("huggingface_hub"), logging.Handler(), []  # it prints by itself as well
    ours.emit = lambda record: told.append(record.getMessage())
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [ours])
    assert main(["push", str(saved), "user/tiny"]) == 0
    first = capsys.readouterr().out
    assert main(["push", str(saved), "user/tiny"]) == 0
    assert capsys.readouterr().out == first
    assert told == []


def test_class_names_of_a_push_come_back_and_stand_in_the_card(regular_hub, model):
    names = ["ant", "bee", "cat", "dog", "eel"]
    timm_csg.push_to_hub(model, "user/tiny", class_names=names, preprocessing={"input_size": (3, 24, 24)})
    loaded = timm_csg.from_pretrained("user/tiny")
    assert loaded.pretrained_cfg["label_names"] == names
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 24, 24)
    readme = regular_hub.repos["user/tiny"].files()["README.md"].decode()
    assert "(ant, bee, cat, dog, eel)" in readme
    assert "torch.rand(1, 3, 24, 24)" in readme


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "user/tiny"], "no checkpoint at nowhere"),
        (["FOLDER", "tiny"], "repo_id must be 'user/name'"),
        (["FOLDER", "user/tiny", "--token", "hf_wrong"], "the Hub does not accept the token"),
        (["FOLDER", "other/tiny"], "the token lacks permission"),
        (["FOLDER", "user/tiny", "--create-pr", "--revision", "x"], "a pull request goes to main"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(regular_hub, saved, capsys, arguments, words):
    arguments = [str(saved) if argument == "FOLDER" else argument for argument in arguments]
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
