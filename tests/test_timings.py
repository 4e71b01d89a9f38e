"""How long operations take: what is kept and what is told of it, without a loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgateway.timings import KEPT, SLOW_SECONDS, Timings

durations = st.lists(st.floats(0, 0.9), min_size=1, max_size=3 * KEPT)


@given(durations)
def test_the_summary_is_of_the_last_hundred(seconds: list[float]) -> None:
    timings = Timings()
    for each in seconds:
        timings.note("send", each)
    last = seconds[-KEPT:]
    summary = timings.summary()["send"]
    assert summary["count"] == len(last)
    assert summary["mean_ms"] == pytest.approx(sum(last) / len(last) * 1000, abs=0.001)
    assert summary["max_ms"] == pytest.approx(max(last) * 1000, abs=0.001)
    assert (summary["slow"], summary["failed"]) == (0, 0)


def test_operations_are_told_apart_and_nothing_is_told_of_what_never_ran() -> None:
    timings = Timings()
    assert timings.summary() == {}
    timings.note("send", 0.001)
    timings.note("look", 0.002)
    assert {name: one["max_ms"] for name, one in timings.summary().items()} == {
        "send": 1.0,
        "look": 2.0,
    }


def test_slow_ones_are_counted_for_good_and_each_is_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    timings = Timings()
    for seconds in (SLOW_SECONDS, SLOW_SECONDS + 0.01, 7.5, *[0.0] * KEPT):
        timings.note("send", seconds)
    summary = timings.summary()["send"]
    assert (summary["slow"], summary["max_ms"]) == (2, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "send took 7.50 s" in caplog.text


def test_a_failure_counts_and_its_duration_too() -> None:
    timings = Timings()
    with timings.measure("send"):
        pass
    for _ in range(2):
        with pytest.raises(LookupError), timings.measure("send"):
            raise LookupError
    summary = timings.summary()["send"]
    assert (summary["count"], summary["failed"]) == (3, 2)
