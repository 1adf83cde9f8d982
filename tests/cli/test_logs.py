"""``--log``: numbers of every epoch for TensorBoard and wandb, through their own packages."""

import sys
import types

import pytest
from cli.folders_of_pictures import make_splits, train

from timm_csg.cli.logs import EpochLog

ROWS = [
    {"recipe": "standard", "epoch": 0, "path": "standard", "loss": 2.0, "accuracy": 0.5},
    {"recipe": "standard", "epoch": 1, "path": "standard", "loss": 1.0, "accuracy": 0.75},
    {"recipe": "assigned", "epoch": 0, "path": "both", "loss": 3.0, "solo": 0.5, "accuracy": 0.25},
]


def test_tensorboard_has_a_run_for_each_training(tmp_path):
    pytest.importorskip("tensorboard", reason="not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with EpochLog("tensorboard", tmp_path, {}) as log:
        for row in ROWS:
            log.epoch(row)
    found = EventAccumulator(str(tmp_path / "tensorboard" / "standard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "accuracy"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    found = EventAccumulator(str(tmp_path / "tensorboard" / "assigned")).Reload()
    assert [event.value for event in found.Scalars("solo")] == [0.5]


def test_wandb_has_a_run_for_each_training_in_one_group(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __init__(self, **options):
            self.name = options["name"]
            calls.append(("init", options["name"], options["group"], options["config"]))

        def log(self, numbers, step):
            calls.append(("log", self.name, step, numbers))

        def finish(self):
            calls.append(("finish", self.name))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: Run(**options)))
    folder = tmp_path / "photos"
    with EpochLog("wandb", folder, {"lr": 0.1}) as log:
        for row in ROWS:
            log.epoch(row)
    assert calls == [
        ("init", "photos standard", "photos", {"lr": 0.1, "recipe": "standard"}),
        ("log", "photos standard", 1, {"loss": 2.0, "accuracy": 0.5}),
        ("log", "photos standard", 2, {"loss": 1.0, "accuracy": 0.75}),
        ("finish", "photos standard"),
        ("init", "photos assigned", "photos", {"lr": 0.1, "recipe": "assigned"}),
        ("log", "photos assigned", 1, {"loss": 3.0, "solo": 0.5, "accuracy": 0.25}),
        ("finish", "photos assigned"),
    ]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_missing_packages_are_named_before_training(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=f"--log {kind} needs its package: pip install {kind}"):
        EpochLog(kind, tmp_path, {})


@pytest.mark.parametrize("kind", [None, "csv"])
def test_nothing_is_written_beside_the_csv_file(kind, tmp_path):
    with EpochLog(kind, tmp_path, {}) as log:
        log.epoch(ROWS[0])
    assert not list(tmp_path.iterdir())


def test_command_logs_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="not installed")
    data = make_splits(tmp_path / "data", ["cat", "dog"])
    assert train(data, tmp_path / "run", "--log", "tensorboard", "--recipe", "assigned") == 0
    assert len(list((tmp_path / "run" / "tensorboard" / "assigned").glob("events.*"))) == 1


def test_command_refuses_what_is_missing_before_it_trains(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = make_splits(tmp_path / "data", ["cat", "dog"])
    assert train(data, tmp_path / "run", "--log", "wandb") == 2
    assert "--log wandb needs its package: pip install wandb" in capfd.readouterr().err
    assert not (tmp_path / "run" / "assigned").exists()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tool_that_fails_does_not_end_the_training(tmp_path, monkeypatch, caplog, where):
    calls = []

    def fail_at(name):
        def call(*arguments, **options):
            calls.append(name)
            if name == where:
                raise OSError("no network")
            return types.SimpleNamespace(log=fail_at("log"), finish=fail_at("finish"))

        return call

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail_at("init")))
    with EpochLog("wandb", tmp_path, {}) as log:
        for row in ROWS:
            log.epoch(row)
    assert calls.count(where) == 1
    assert "(OSError: no network)" in caplog.text


def test_a_tool_that_fails_hides_no_error_of_the_training(tmp_path, monkeypatch):
    run = types.SimpleNamespace(log=lambda numbers, step: None, finish=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    log = EpochLog("wandb", tmp_path, {})
    log.epoch(ROWS[0])
    with pytest.raises(KeyError, match="training"), log:
        raise KeyError("training")
