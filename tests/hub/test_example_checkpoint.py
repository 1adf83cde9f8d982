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
FOLDER = EXAMPLES / "cifar10_resnet20_assigned"


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


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the trained checkpoint is not there yet")
def test_trained_checkpoint_loads_here_and_in_plain_timm():
    model = timm_csg.from_pretrained(FOLDER)
    plain = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(images), model(images))
    assert model.mechanism.class_filter_matrix().shape == (10, 64)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the trained checkpoint is not there yet")
def test_trained_checkpoint_is_in_the_pushed_layout():
    names = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert {"model.safetensors", "mechanism/timm_csg.safetensors", "config.json", "metrics.json", "README.md"} <= names
    assert all(name.startswith(("assets/", "mechanism/")) or "/" not in name for name in names)
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    assert {"accuracy", "data", "seed"} <= set(metrics)
    assert card.has_block((FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2 * 2**20
