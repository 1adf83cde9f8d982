"""Schedules: literal sequences, and the rules of the released runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_csg import Alternating, Joint


def epochs(schedule, count):
    return [schedule.path(epoch, step=0) for epoch in range(count)]


def test_alternating_defaults_to_one_gated_epoch_in_three():
    assert epochs(Alternating(), 7) == ["standard", "standard", "gated"] * 2 + ["standard"]


def test_warmup_of_ten_gives_the_authors_sequence():
    authors = ["gated" if epoch % 3 >= 2 and epoch >= 10 else "standard" for epoch in range(151)]
    assert epochs(Alternating(period=3, gated=1, warmup=10), 151) == authors
    assert authors.count("gated") == 47


@pytest.mark.parametrize(("gated", "expected"), [(0, {"standard"}), (4, {"gated"})])
def test_gated_share_can_be_none_or_all(gated, expected):
    assert set(epochs(Alternating(period=4, gated=gated), 20)) == expected


def test_two_of_three_epochs_are_gated_at_the_end_of_each_cycle():
    assert epochs(Alternating(period=3, gated=2), 4) == ["standard", "gated", "gated", "standard"]


def test_step_unit_ignores_the_epoch():
    schedule = Alternating(period=2, gated=1, warmup=3, unit="step")
    assert [schedule.path(epoch=9, step=step) for step in range(6)] == [*["standard"] * 3, "gated", "standard", "gated"]


def test_epoch_unit_ignores_the_step():
    assert {Alternating().path(2, step) for step in range(10)} == {"gated"}


@pytest.mark.parametrize(("unit", "at"), [("epoch", (2, 0)), ("step", (0, 2))])
def test_joint_is_both_after_its_warmup(unit, at):
    schedule = Joint(warmup=2, unit=unit)
    assert schedule.path(0, 0) == "standard"
    assert schedule.path(*at) == "both"


@given(
    st.integers(1, 9).flatmap(lambda period: st.tuples(st.just(period), st.integers(0, period))),
    st.integers(0, 20),
    st.integers(0, 100),
)
def test_any_full_cycle_after_warmup_has_exactly_the_gated_share(cycle, warmup, start):
    period, gated = cycle
    schedule = Alternating(period=period, gated=gated, warmup=warmup)
    paths = [schedule.path(epoch, 0) for epoch in range(warmup + start, warmup + start + period)]
    assert paths.count("gated") == gated


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"period": 0}, "period.*0"),
        ({"period": 2.5}, r"period.*2\.5"),
        ({"period": 3, "gated": 4}, "gated.*3.*4"),
        ({"gated": -1}, "gated.*-1"),
        ({"warmup": -2}, "warmup.*-2"),
        ({"unit": "batch"}, "unit.*'batch'"),
    ],
)
def test_alternating_names_the_wrong_option_and_its_value(options, found):
    with pytest.raises(ValueError, match=found):
        Alternating(**options)


@pytest.mark.parametrize("options", [{"warmup": -1}, {"warmup": 0.5}, {"unit": "day"}])
def test_joint_refuses_wrong_options(options):
    with pytest.raises(ValueError, match=r"warmup|unit"):
        Joint(**options)


def test_schedules_compare_by_value():
    assert Alternating(3, 1) == Alternating()
    assert Joint() != Joint(warmup=1)
