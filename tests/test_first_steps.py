"""Loops without ``attach``: a mechanism that no optimizer moves and steps that nobody counts are told, once."""

import logging

import pytest
import torch
import torch.nn.functional as F

import timm_csg
from timm_csg import first_steps
from timm_csg.schedule import Alternating, Joint


@pytest.fixture
def model(make_model):
    return timm_csg.differentiate(make_model(), mechanism="csg").train()


def train(model, optimizer, images, targets, *, epochs=3, batches=6, schedule=None, project=True, tell=True, lr=None):
    loop = timm_csg.TrainingMixin()
    loop.schedule = Joint() if schedule is None else schedule
    for epoch in range(epochs):
        if tell:
            loop.set_epoch(epoch)
        for _ in range(batches):
            loss = loop.losses(model, images, targets, F.cross_entropy)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if project:
                loop.after_step(model)
    return loop


def without_gate(model, lr=0.01):
    return torch.optim.SGD([value for name, value in model.named_parameters() if "mechanism" not in name], lr=lr)


def test_gate_that_the_optimizer_lacks_is_told_once_after_the_first_epoch(model, images, targets, caplog):
    loop = train(model, without_gate(model), images, targets, epochs=1)  # projecting alone has changed the gate
    assert "did not change" not in caplog.text
    loop.set_epoch(1)
    for _ in range(2):
        loop.losses(model, images, targets, F.cross_entropy)
    assert caplog.text.count("did not change") == 1
    assert "mechanism.gate did not change in 6 gated batches" in caplog.text
    assert "make it of timm_csg.param_groups(model, lr=...) after differentiate()" in caplog.text


def test_loops_that_are_right_hear_nothing_and_are_not_looked_at_any_more(model, images, targets, caplog):
    loop = train(model, torch.optim.SGD(model.parameters(), lr=0.01), images, targets)
    assert caplog.text == ""
    assert loop._first_steps.is_done
    assert loop._first_steps.own == {}


def test_loop_that_counts_no_step_is_told(model, images, targets, caplog):
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), images, targets, project=False)
    assert caplog.text.count("6 batches were trained, but no step was counted") == 1
    assert "did not change" not in caplog.text


def test_loop_without_epochs_is_told_after_many_batches(model, images, targets, caplog, monkeypatch):
    monkeypatch.setattr(first_steps, "_MOST", 4)
    train(model, without_gate(model), images, targets, epochs=1, batches=4, tell=False)
    assert "did not change" not in caplog.text
    train(model, without_gate(model), images, targets, epochs=1, batches=5, tell=False)
    assert "mechanism.gate did not change in 4 gated batches" in caplog.text


def test_epochs_that_leave_the_gate_out_say_nothing_about_it(model, images, targets, caplog):
    loop = train(model, without_gate(model), images, targets, epochs=2, schedule=Alternating(period=3, gated=1))
    assert caplog.text == ""
    assert not loop._first_steps.is_done
    train(model, without_gate(model), images, targets, epochs=4, schedule=Alternating(period=3, gated=1))
    assert "mechanism.gate did not change in 5 gated batches" in caplog.text


def test_steps_that_move_nothing_are_no_training(model, images, targets, caplog):
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), images, targets, project=False)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["frozen", "measured only", "no parameters"])
def test_mechanisms_with_nothing_to_learn_are_left_alone(make_model, images, targets, caplog, kind):
    if kind == "measured only":
        model = timm_csg.differentiate(make_model(), mechanism="csg", gated_weight=0.0, sparsity_weight=0.0).train()
    else:
        model = timm_csg.differentiate(make_model(), mechanism="icnn" if kind == "no parameters" else "csg").train()
        model.mechanism.requires_grad_(False)
    train(model, without_gate(model), images, targets)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_attached_loops_are_not_looked_at(model, images, targets):
    loop, optimizer = timm_csg.TrainingMixin(), torch.optim.SGD(model.parameters(), lr=0.01)
    loop.schedule = Joint()
    loop.attach(optimizer, model)
    loop.losses(model, images, targets, F.cross_entropy)
    assert loop._first_steps.is_done
