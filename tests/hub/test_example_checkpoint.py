"""The trained checkpoint in ``examples/``: in the pushed layout, and loaded by both worlds."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_csg
from timm_csg import card

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/config.json"))
each_checkpoint = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Importing the file registers the architecture."""
    sys.path.insert(0, str(EXAMPLES))
    importlib.import_module("cifar_resnet20")
    sys.path.remove(str(EXAMPLES))


def test_architecture_of_ones_own_round_trips(tmp_path, monkeypatch, gated):
    model = gated(timm_csg.differentiate(timm.create_model("resnet20_cifar"), mechanism="csg")).eval()
    timm_csg.save_pretrained(model, tmp_path / "own")
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    loaded = timm_csg.from_pretrained(tmp_path / "own")
    assert torch.equal(loaded(images, targets), model(images, targets))
    assert "import the file that registers it first" in (tmp_path / "own" / "README.md").read_text()
    monkeypatch.setattr(timm, "is_model", lambda name: False)
    with pytest.raises(timm_csg.CheckpointError, match="import the file that registers it"):
        timm_csg.from_pretrained(tmp_path / "own")


def test_there_are_checkpoints():
    assert len(FOLDERS) >= 3


@each_checkpoint
def test_trained_checkpoint_loads_here_and_in_plain_timm(folder):
    model = timm_csg.from_pretrained(folder)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(4, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    same = torch.equal(plain(images), model(images))
    assert same or model.mechanism.name == "icnn"  # its masks act at inference, and only here
    owners = model.mechanism.class_filter_matrix()
    assert owners is not None
    assert owners.shape == (10, model.num_features)


@each_checkpoint
def test_trained_checkpoint_is_in_the_pushed_layout(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "mechanism/timm_csg.safetensors", "config.json", "metrics.json", "README.md"} <= names
    assert all(name.startswith(("assets/", "mechanism/")) or "/" not in name for name in names)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"accuracy", "data", "seed"} <= set(metrics)
    assert card.has_block((folder / "README.md").read_text(encoding="utf-8"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2 * 2**20
