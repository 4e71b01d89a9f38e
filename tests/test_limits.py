"""The sliding window and what a reconnect inherits, with a clock of the test's own."""

from __future__ import annotations

import random
import sys

from hypothesis import given
from hypothesis import strategies as st

from wsgateway.limits import MAX_RUNS, Departed, Window

gaps = st.lists(st.floats(0, 40, allow_nan=False), min_size=1, max_size=300)


@given(gaps, st.integers(1, 20))
def test_a_window_admits_exactly_what_fits_into_any_window(gaps: list[float], limit: int) -> None:
    window, admitted, now = Window(limit, 60), list[float](), 1000.0
    for gap in gaps:
        now += gap
        recent = [at for at in admitted if at > now - 60]
        expected = len(recent) < limit
        assert (window.wait(now) == 0) or not expected or window.used(now) < limit
        assert window.admit(now) == expected
        if expected:
            admitted.append(now)
        assert window.used(now) == len([at for at in admitted if at > now - 60])


@given(st.integers(), st.floats(0.01, 3))
def test_a_large_window_never_admits_more_than_its_limit(seed: int, longest: float) -> None:
    limit, gap = MAX_RUNS + 10, random.Random(seed)
    window, admitted, now = Window(limit, 60), list[float](), 0.0
    for _ in range(600):
        now += gap.uniform(0, longest)
        if window.admit(now):
            admitted.append(now)
            assert sum(at > now - 60 for at in admitted) <= limit
        else:
            # It may err against the sender, by one grain at most.
            assert sum(at > now - 60 - 60 / MAX_RUNS for at in admitted) >= limit


def test_the_fixed_windows_border_gains_nothing() -> None:
    window = Window(100, 60)
    assert all(window.admit(59.0) for _ in range(100))
    assert not window.admit(61.0)
    assert not window.admit(118.9)
    assert window.admit(119.0)


def test_waiting_as_long_as_told_is_enough_and_not_too_long() -> None:
    window = Window(2, 60)
    assert window.admit(10)
    assert window.admit(20)
    assert not window.admit(30)
    assert window.wait(30) == 40
    assert not window.admit(69.9)
    assert window.admit(70)


def test_what_a_window_holds_does_not_depend_on_its_limit() -> None:
    window = Window(1_000_000_000, 60)
    for message in range(200_000):
        assert window.admit(message / 10_000)
    runs = window._runs
    assert runs is not None
    assert len(runs) <= MAX_RUNS + 1
    assert sum(map(sys.getsizeof, runs)) < 32_768


def test_an_idle_window_holds_nothing() -> None:
    assert Window(100, 60)._runs is None


def test_a_reconnect_inherits_and_a_stranger_does_not() -> None:
    departed = Departed(limit=2, seconds=60, size=10)
    window = departed.inherit("a", 0)
    assert window.admit(0)
    assert window.admit(1)
    departed.leave("a", window, 5)
    assert departed.inherit("a", 10).wait(10) == 50
    assert departed.inherit("b", 10).wait(10) == 0
    assert departed.inherit("a", 66).wait(66) == 0
    assert len(departed) == 0


def test_two_that_inherit_do_not_share_and_the_fuller_window_is_remembered() -> None:
    departed = Departed(limit=3, seconds=60, size=10)
    first = departed.inherit("a", 0)
    assert first.admit(0)
    departed.leave("a", first, 1)
    second, third = departed.inherit("a", 2), departed.inherit("a", 2)
    assert second.admit(2)
    assert second.admit(2)
    assert not second.admit(2)
    assert third.admit(2)
    departed.leave("a", second, 3)
    departed.leave("a", third, 3)
    assert departed.inherit("a", 4).wait(4) > 0


def test_the_longest_gone_is_forgotten_first_and_counted() -> None:
    departed = Departed(limit=1, seconds=60, size=2)
    for owner in "abc":
        window = departed.inherit(owner, 0)
        assert window.admit(0)
        departed.leave(owner, window, 0)
    assert departed.forgotten == 1
    assert departed.inherit("a", 1).wait(1) == 0
    assert departed.inherit("c", 1).wait(1) > 0
