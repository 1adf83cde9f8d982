"""The layout of a run folder, which train writes and every other command reads."""

import json
from dataclasses import asdict

import pytest

from timm_csg.cli.preprocessing import input_config
from timm_csg.cli.runs import RunFolder
from timm_csg.cli.settings import TrainSettings

COLOUR = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "input_size": (3, 64, 64), "crop_pct": 0.9}


@pytest.fixture
def run(tmp_path):
    """A run of two recipes and a model that is none of them."""
    found = RunFolder(tmp_path / "run")
    for name in ("standard", "assigned", "another"):
        found.model_of(name).mkdir(parents=True)
        (found.model_of(name) / "config.json").write_text("{}")
    found.settings_file.write_text(json.dumps(asdict(TrainSettings(recipe=["standard", "assigned"]).resolved())))
    return found


def test_models_come_in_the_order_of_the_settings(run):
    assert run.models() == [run.model_of(name) for name in ("standard", "assigned", "another")]


def test_a_run_is_found_from_itself_and_from_its_models(run):
    for place in (run.path, run.model_of("assigned"), f"local-dir:{run.model_of('assigned')}"):
        assert RunFolder.of(place).path == run.path
    assert RunFolder.of(run.path / "assigned") is None


def test_the_standard_model_is_not_compared_with_itself(run):
    assert run.standard_beside(run.model_of("assigned")) == run.model_of("standard")
    assert run.standard_beside(run.model_of("standard")) is None


def test_a_grey_model_gets_grey_normalisation_and_digits_are_not_cropped():
    def config(in_chans, cfg, **options):
        return input_config(cfg, in_chans, TrainSettings(**options))

    assert config(1, COLOUR)["mean"] == (0.5,)
    assert config(1, COLOUR | {"mean": (0.3,), "std": (0.1,)})["mean"] == (0.3,)
    assert config(3, COLOUR, img_size=32)["input_size"] == (3, 32, 32)
    assert config(3, COLOUR)["crop_pct"] == 1.0
    assert input_config(COLOUR, 3, TrainSettings(), has_data=False)["crop_pct"] == 0.9
    assert config(3, COLOUR, data="torch/cifar10", data_dir="x")["crop_pct"] == 0.9
