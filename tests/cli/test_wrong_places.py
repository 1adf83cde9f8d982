"""Folders that are no checkpoint and places that cannot be written: one sentence, before any work."""

import json
import re

import pytest

from timm_csg.cli import main

FOREIGN = {
    "empty": {},
    "a list": ["resnet18"],
    "of another kind": {"hidden_size": 8},
    "no name": {"architecture": ["resnet18"]},
}


@pytest.mark.parametrize("command", ["evaluate", "inspect", "report", "export"])
@pytest.mark.parametrize("name", FOREIGN)
def test_config_of_another_program_is_one_sentence(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FOREIGN[name]))
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "config.json does not describe a model that can be built: it names no architecture of timm" in error


@pytest.mark.parametrize("name", ["nothing", {"foo": 1}])
def test_config_that_timm_cannot_build_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {"architecture": name} if name == "nothing" else {"architecture": "resnet18", "model_args": name}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 3, "pretrained_cfg": {}}))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "timm cannot load local-dir:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("missing/model.onnx", "the folder of --output .* does not exist"),
        (".", "is a folder; name a file in it, such as .*model.onnx"),
    ],
)
def test_export_looks_at_its_place_before_the_work(output, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm_csg.cli.checkpoints.load_with_input", lambda *_: pytest.fail("the model was loaded"))
    assert main(["export", "anything", "--output", output]) == 2
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))
