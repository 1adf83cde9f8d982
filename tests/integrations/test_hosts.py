"""The contract: alternation, projection and resuming are the same in every host."""

import copy

import pytest
import torch
from integrations.hosts import BATCHES, HOSTS, Training

import timm_csg
from timm_csg import Alternating, Joint, TrainingMixin, list_mechanisms

SCHEDULES = {
    "alternating": Alternating(period=3, gated=1),
    "joint": Joint(),
    "by step": Alternating(period=3, gated=1, unit="step"),
}
DONE = {}  # the plain loop's trainings are asked for again and again
OTHERS = [name for name in HOSTS if name != "plain loop"]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_host = pytest.mark.parametrize("host", OTHERS)


def slow_unless(quick):
    return [] if quick else [pytest.mark.slow]


by_step = pytest.mark.parametrize(
    "schedule",
    [pytest.param(one, id=name, marks=slow_unless(name == "by step")) for name, one in SCHEDULES.items()],
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Train in a host; what it records comes from the one place that all hosts must pass after each step."""

    def run(host, training, *, resume=None, every=None):
        key = (host, repr(training))
        if resume is None and every is None and key in DONE:
            return copy.deepcopy(DONE[key])
        after_step, losses = TrainingMixin.after_step, TrainingMixin.losses

        def seeded(self, *args):
            torch.manual_seed(self.progress.step)  # hosts draw other random numbers between the mechanism's own
            return losses(self, *args)

        def recorded(self, model):
            path = self.path
            after_step(self, model)
            training.record(path, timm_csg.training._inner(model))

        folder = tmp_path / host
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingMixin, "after_step", recorded)
            patch.setattr(TrainingMixin, "losses", seeded)
            result = HOSTS[host](training, folder, resume, every)
        if resume is None and every is None:
            DONE[key] = copy.deepcopy(result)
        return result

    return run


def assert_same(training, expected, *, start=0):
    assert [path for path, _, _ in training.trace] == [path for path, _, _ in expected.trace[start:]]
    for step, (found, wanted) in enumerate(zip(training.trace, expected.trace[start:], strict=True)):
        torch.testing.assert_close(found[1:], wanted[1:], msg=lambda text, step=step: f"after step {step}: {text}")
    torch.testing.assert_close(training.final, expected.final)


@pytest.mark.parametrize(
    ("mechanism", "schedule"),
    [
        pytest.param(
            mechanism,
            schedule,
            id=f"{mechanism}-{name}",
            marks=slow_unless(mechanism == "csg"),
        )
        for mechanism in [*list_mechanisms(), ("icnn", "assigned")]
        for name, schedule in SCHEDULES.items()
    ],
)
@each_host
def test_gates_after_every_step_are_those_of_the_plain_loop(run, host, schedule, mechanism):
    expected = run("plain loop", Training(schedule, mechanism))
    assert len(expected.trace) == 4 * BATCHES
    assert_same(run(host, Training(schedule, mechanism)), expected)


@pytest.mark.slow
@each_schedule
@each_host
def test_accumulated_gradients_make_one_step_and_one_projection(run, host, schedule):
    expected = run("plain loop", Training(schedule, accumulate=2))
    assert len(expected.trace) == 4 * BATCHES // 2
    assert_same(run(host, Training(schedule, accumulate=2)), expected)


@pytest.mark.slow
@each_schedule
@pytest.mark.parametrize("host", [host for host in OTHERS if host != "timm task, not attached"])
def test_steps_that_an_amp_scaler_skips_neither_move_the_gate_nor_count(run, host, schedule):
    expected = run("plain loop", Training(schedule, overflows=True))
    assert len(expected.trace) == 4 * (BATCHES - 1)
    assert_same(run(host, Training(schedule, overflows=True)), expected)


@pytest.mark.slow
def test_unattached_timm_task_counts_skipped_steps_as_train_py_does_and_leaves_the_gate_alone(run):
    expected = run("plain loop", Training(Joint(), overflows=True))
    found = run("timm task, not attached", Training(Joint(), overflows=True))
    assert len(found.trace) == 4 * BATCHES
    for epoch in range(4):
        del found.trace[epoch * (BATCHES - 1) + 1]
    assert_same(found, expected)


@by_step
@pytest.mark.parametrize("host", HOSTS)
def test_resumed_between_epochs_training_goes_on_as_if_never_stopped(run, host, schedule):
    expected = run("plain loop", Training(schedule))
    run(host, Training(schedule), every=BATCHES)
    assert_same(run(host, Training(schedule), resume=2 * BATCHES), expected, start=2 * BATCHES)


@pytest.mark.slow
@each_schedule
@pytest.mark.parametrize("host", ["Lightning", "transformers"])
def test_resumed_within_an_epoch_training_goes_on_as_if_never_stopped(run, host, schedule):
    expected = run("plain loop", Training(schedule))
    run(host, Training(schedule), every=3)
    assert_same(run(host, Training(schedule), resume=9), expected, start=9)


@pytest.mark.slow
def test_resumed_after_a_skipped_step_the_count_is_that_of_the_steps_done(run):
    for host in ("Lightning", "transformers"):
        expected = run(host, Training(SCHEDULES["by step"], overflows=True), every=BATCHES)
        resumed = run(host, Training(SCHEDULES["by step"], overflows=True), resume=2 * BATCHES)
        assert_same(resumed, expected, start=2 * (BATCHES - 1))
