"""The examples run, and stay short enough to be read."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_csg

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch):
    """Load an example as a script would see it, and call its main."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(argument) for argument in arguments])

    return run


@pytest.fixture
def cifar(tmp_path):
    """An .npz like that of CIFAR-10: encoded pictures one after the other, their offsets and labels."""
    random, arrays = np.random.default_rng(0), {}
    for split, size in (("train", 40), ("test", 40)):
        encoded = []
        for pixels in random.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8):
            handle = io.BytesIO()
            Image.fromarray(pixels).save(handle, "PNG")
            encoded.append(handle.getvalue())
        arrays[f"{split}_data"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_label"] = np.arange(size) % 10
    np.savez(tmp_path / "cifar.npz", **arrays)
    return tmp_path / "cifar.npz"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_have_at_most_90_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 90


@pytest.mark.parametrize("options", [[], ["--competitive"]], ids=["alternating", "competitive"])
def test_plain_loop_learns_and_saves(run_example, tmp_path, options):
    result = run_example("plain_loop", "--epochs", 3, "--output", tmp_path / "model", *options)
    assert result["accuracy"] > 0.5
    assert 0 < result["MIS"] < 0.34
    assert 0.1 <= result["density"] <= 1
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.rand(2, 1, 24, 24)
    assert torch.equal(plain(images), timm_csg.from_pretrained(tmp_path / "model")(images))


@pytest.mark.parametrize("recipe", ["standard", "competitive", "paper"])
def test_cifar10_runs_on_a_file_of_its_format(run_example, cifar, tmp_path, recipe):
    output = tmp_path / recipe
    arguments = ["--data", cifar, "--recipe", recipe, "--epochs", 1, "--batch-size", 20, "--output", output]
    result = run_example("cifar10", *arguments)
    assert json.loads((output / "metrics.json").read_text()) == result
    assert 0 <= result["accuracy"] <= 1
    assert ("gate_density" in result) == (recipe != "standard")
    if recipe != "standard":
        assert timm_csg.from_pretrained(output).mechanism.class_filter_matrix().shape == (10, 64)
