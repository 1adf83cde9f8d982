"""--freeze backbone without augmentation: features are computed once, and training from them changes no number."""

import csv

import pytest
import torch
from cli.unmeasured import leave_out_measuring
from safetensors.torch import load_file

from timm_csg import freeze
from timm_csg.cli import frozen, main
from timm_csg.cli.engine import Training

SMALL = ["--img-size", "16", "--batch-size", "128", "--warmup-epochs", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    leave_out_measuring(monkeypatch)


def run(output, *options, recipe="standard", epochs=2):
    frozen_run = ["--recipe", recipe, "--epochs", str(epochs), "--freeze", "backbone", "--no-aug", *SMALL, *options]
    return main(["train", "--output", str(output), *frozen_run])


def state(output, recipe="standard"):
    weights = load_file(output / recipe / "model" / "model.safetensors")
    with (output / "log.csv").open() as handle:
        log = [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(handle)]
    return weights, log


def assert_same(one, other, recipe="standard"):
    (weights, log), (others, other_log) = state(one, recipe), state(other, recipe)
    assert log == other_log
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@pytest.fixture
def uncached(monkeypatch):
    """A run whose features are held to be too large."""

    def run_it(output, *options, **more):
        with monkeypatch.context() as patch:
            patch.setattr(frozen, "LARGEST", 0)
            assert run(output, *options, **more) == 0

    return run_it


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("standard", ["--drop-rate", "0.3"]),
        (
            "standard",
            ["--model", "test_vit", "--img-size", "32", "--model-kwargs", "class_token=true", "--channels-last"],
        ),
        ("joint", ["--amp", "--model-ema", "--model-ema-decay", "0.5"]),
    ],
    ids=["dropout in the head", "tokens", "label gate, AMP and EMA"],
)
def test_weights_and_log_are_those_of_training_from_pictures(recipe, options, tmp_path, uncached, capsys):
    assert run(tmp_path / "cached", *options, recipe=recipe) == 0
    assert "frozen layers, once" in capsys.readouterr().out
    uncached(tmp_path / "plain", *options, recipe=recipe)
    assert "so the frozen layers run in every epoch" in capsys.readouterr().out
    assert_same(tmp_path / "cached", tmp_path / "plain", recipe)


def test_frozen_layers_see_every_picture_once(tmp_path, monkeypatch):
    seen = []
    plain = frozen._features
    monkeypatch.setattr(frozen, "_features", lambda training, model, images: plain(training, model, seen_(images)))

    def seen_(images):
        seen.append(len(images))
        return images

    trained = []
    losses = Training._losses

    def recorded(self, images, targets):
        trained.append(tuple(images.shape[1:]))
        return losses(self, images, targets)

    monkeypatch.setattr(Training, "_losses", recorded)
    assert run(tmp_path / "out", epochs=3) == 0
    assert sum(seen) == 1201 + 128  # and the first batch again, in training mode
    assert set(trained) == {(96, 2, 2)}
    assert len(trained) == 3 * 9


def test_interrupted_training_goes_on_from_features(tmp_path, monkeypatch):
    def interrupt(self):
        save(self)
        raise KeyboardInterrupt

    save = Training._save
    assert run(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save", interrupt)
        assert run(tmp_path / "out") == 130
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_layers_with_stochastic_depth_run_in_every_epoch(tmp_path, capsys):
    options = ["--model", "test_convnext", "--img-size", "32", "--model-kwargs", "drop_path_rate=0.5"]
    assert run(tmp_path / "out", *options, epochs=1) == 0
    expected = "standard: some frozen layers, such as dropout, act in training only, so the frozen layers run in every"
    assert expected in capsys.readouterr().out


def test_features_with_a_trained_norm_are_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_csg.cli.build.freeze", lambda model, what: freeze(model, "all-but-last-stage"))
    assert run(tmp_path / "out", epochs=1) == 0
    assert "a trained layer is among those that make the features" in capsys.readouterr().out


def test_augmented_pictures_are_not_kept(tmp_path, capsys):
    options = ["--freeze", "backbone", "--recipe", "standard", "--epochs", "1", *SMALL]
    assert main(["train", "--output", str(tmp_path / "out"), *options]) == 0
    assert "frozen layers" not in capsys.readouterr().out


def test_resuming_does_not_fit_assigned_filters_again(tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "out", recipe="assigned") == 0
    monkeypatch.setattr("timm_csg.cli.engine.adapt", None)
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert run(tmp_path / "out", "--seed", "3", recipe="assigned") == 2
    assert "holds a run with other settings" in capsys.readouterr().err
