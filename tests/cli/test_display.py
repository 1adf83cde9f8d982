"""Progress in a pipe: which lines there are, when, and that the time they name is the time that is left."""

import io

import pytest
from rich.console import Console

from timm_csg.cli.display import LiveDisplay

EPOCH = {"epoch": 0, "path": "standard", "loss": 1.25, "accuracy": 0.5, "density": 0.125, "seconds": 30.4}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def display(clock, output):
    """Two trainings of two epochs of ten batches each."""
    with LiveDisplay(Console(file=output, width=200, get_time=clock), ["one", "two"], 40) as display:
        yield display


def batches(display, clock, count, seconds=3.0):
    for _ in range(count):
        clock.now += seconds
        display.batch("standard")


def test_time_left_is_that_of_all_batches_of_all_trainings(display, clock, output):
    display.begin("one", 2, [], 10)
    batches(display, clock, 2)
    assert output.getvalue() == ""
    batches(display, clock, 1)
    assert output.getvalue() == "one: the first batches are done, about 0:01:51 left\n"  # 37 batches of 3 s
    batches(display, clock, 7)
    display.epoch(EPOCH)
    line = "one: epoch 1/2 (standard), loss 1.250, accuracy 0.5000, density 0.125, 30 s, about 0:01:30 left"
    assert output.getvalue().splitlines()[1:] == [line]


def test_epochs_done_before_a_resume_are_neither_left_nor_fast(display, clock, output):
    display.begin("one", 2, [EPOCH], 10)
    batches(display, clock, 10)
    display.epoch(EPOCH | {"epoch": 1})
    assert output.getvalue().splitlines()[-1].startswith("one: epoch 2/2 (standard)")
    assert output.getvalue().endswith("about 0:01:00 left\n")  # the other training's 20 batches


def test_first_batches_are_told_once_and_only_if_an_epoch_is_slow(display, clock, output):
    display.begin("one", 2, [], 10)
    batches(display, clock, 10, seconds=0.1)
    display.epoch(EPOCH)
    batches(display, clock, 10)
    assert output.getvalue().count("\n") == 1
    assert "first batches" not in output.getvalue()


def test_what_happens_between_trainings_is_a_line(display, output):
    display.note("measuring one")
    with display.counting("features of frozen layers", 3) as count:
        count(3)
    assert output.getvalue() == "measuring one\nfeatures of frozen layers\n"


def test_nothing_is_written_without_a_console(clock, capsys):
    with LiveDisplay(None, ["one"], 10) as display:
        display.say("run folder: x")
        display.begin("one", 1, [], 10)
        batches(display, clock, 10)
        display.epoch(EPOCH)
        display.note("measuring one")
    assert capsys.readouterr() == ("", "")
