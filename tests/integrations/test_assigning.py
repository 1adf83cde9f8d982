"""Every host assigns the filters before the first step, from its training pictures, and keeps them on resume."""

import logging
import os

import pytest
import timm
import torch
from integrations.hosts import BATCHES, HOSTS, Loader, Training
from processes import free_port, run_in_processes
from timm.utils.model import unwrap_model

import timm_csg
from timm_csg import Joint
from timm_csg.integrations.timm_task import DifferentiationTask

each_host = pytest.mark.parametrize("host", ["plain loop", "timm task", "Lightning", "transformers"])


def by_hand():
    """The mechanism's state after ``assign_filters`` on the pictures that all hosts train on."""
    model = Training(Joint(), "assigned").model()
    timm_csg.assign_filters(model, Loader())
    return model.mechanism.state_dict()


@each_host
def test_assignment_is_that_of_the_training_pictures_and_is_logged(host, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="timm_csg"):
        final = HOSTS[host](Training(Joint(), "assigned", epochs=1), tmp_path).final
    assert final["mechanism.assigned_from_data"]
    assert torch.equal(final["mechanism.owned"], by_hand()["owned"])
    assert not final["fc.weight"][~final["mechanism.owned"].bool()].any()
    (message,) = [text for text in caplog.messages if "were assigned" in text]
    assert "s: Assignment(96 filters, 5 classes" in message


@each_host
def test_resumed_training_keeps_the_assignment_and_looks_at_nothing(host, tmp_path, monkeypatch):
    training = Training(Joint(), "assigned", epochs=2)
    expected = HOSTS[host](training, tmp_path, every=BATCHES).final
    monkeypatch.setattr(timm_csg.training, "assign_filters", None)
    resumed = HOSTS[host](Training(Joint(), "assigned", epochs=2), tmp_path, resume=BATCHES).final
    torch.testing.assert_close(resumed, expected)


def train_in_process(rank, host, folder):
    """One of two processes, with half of the pictures and a start of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    if host != "Lightning":  # which makes the group by itself
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    final = HOSTS[host](Training(Joint(), "assigned", epochs=1), folder).final
    torch.save(final, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "host",
    [
        "plain loop",
        "timm task",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Lightning", "transformers")),
    ],
)
def test_two_processes_have_the_assignment_of_all_pictures(host, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    run_in_processes(train_in_process, host, tmp_path, count=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["mechanism.owned"], second["mechanism.owned"])
    own = first["mechanism.owned"].bool()
    expected = timm_csg.assign_filters(Training(Joint(), "assigned").model(), Loader())
    # Half of these filters never respond; who gets which of them depends on the last bit, and so on threads.
    alive = expected.correlations.abs().amax(dim=0) > 1e-3
    assert torch.equal(own[:, alive], expected.matrix[:, alive])
    assert sorted(own.sum(dim=1)) == sorted(expected.matrix.sum(dim=1))


def test_copies_made_before_get_the_assignment_too(make_model, images, targets):
    model = timm_csg.differentiate(make_model())
    average = timm.utils.ModelEmaV3(model)
    loop = timm_csg.TrainingMixin()
    found = loop.assign_filters(model, Loader(), averages=[average])
    for key, value in model.state_dict().items():
        assert torch.equal(value, average.module.state_dict()[key]), key
    assert torch.equal(average.module.mechanism.draws, model.mechanism.draws)
    assert loop.assign_filters(model, Loader()) is None
    assert torch.equal(found.matrix, model.mechanism.assignment)


def test_task_gives_its_ema_the_assignment():
    task = DifferentiationTask(Training(Joint(), "assigned").model(), schedule=Joint(), verbose=False)
    task.setup_ema(decay=0.5)
    task.assign_filters(task.get_trainable_module(), Loader())
    average = unwrap_model(task.get_trainable_module(ema=True))
    assert torch.equal(average.mechanism.owned, by_hand()["owned"])
    assert not average.fc.weight.any()


@pytest.mark.parametrize("case", ["other mechanism", "steps were taken"])
def test_nothing_is_assigned_where_nothing_is_to_be_done(make_model, case):
    mechanism, loop = "csg" if case == "other mechanism" else "assigned", timm_csg.TrainingMixin()
    model = timm_csg.differentiate(make_model(), mechanism=mechanism)
    if case == "steps were taken":
        loop.progress = timm_csg.Progress(step=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert loop.assign_filters(model, None) is None
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
