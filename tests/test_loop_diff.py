"""The script in the documentation runs before and after, and the difference is as small as the page says."""

import re
import sys
import types
from pathlib import Path

import pytest
import timm
import torch

import timm_csg

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "write-your-own-loop.md"


@pytest.fixture
def lines():
    """The lines of the page's diff."""
    return re.search(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[
        1
    ].splitlines()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script with data of its own, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    data = types.ModuleType("my_data")
    torch.manual_seed(0)
    batches = [(torch.rand(5, 3, 64, 64), torch.arange(5)) for _ in range(2)]
    data.plain_loader = data.train_loader = data.validation_loader = batches
    monkeypatch.setitem(sys.modules, "my_data", data)

    def execute(lines):
        namespace = {"__name__": "script"}
        exec(compile("\n".join(line[1:] for line in lines), str(PAGE), "exec"), namespace)
        return namespace

    return execute


def test_script_before_and_after_train_and_save(lines, run, tmp_path, capsys):
    run([line for line in lines if line[:1] != "+"])
    assert timm.create_model("test_resnet", num_classes=5).load_state_dict(torch.load(tmp_path / "model.pt"))
    after = run([line for line in lines if line[:1] != "-"])
    model = timm_csg.from_pretrained(tmp_path / "model")
    assert torch.equal(model.mechanism.assignment, after["model"].mechanism.assignment)
    assert not model.fc.weight[~model.mechanism.assignment].any()
    assert after["loop"].progress.step == 4
    assert capsys.readouterr().out.count("epoch 1: loss ") == 2


def test_four_lines_are_new(lines):
    assert len([line for line in lines if line.startswith("+")]) == 4
    assert len([line for line in lines if line.startswith("-")]) == 5
