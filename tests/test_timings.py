"""How long operations take: what is kept and what is told of it, without a loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgateway.timings import BRIEF, KEPT, LASTING, LONG, SLOW_SECONDS, Durations, Histogram

durations = st.lists(st.floats(0, 0.9), min_size=1, max_size=3 * KEPT)


@pytest.mark.parametrize("bounds", [BRIEF, LONG, LASTING, (1.0,)], ids=len)
@given(values=st.lists(st.floats(0, 1e6), max_size=50))
def test_each_value_is_in_the_first_bucket_that_can_hold_it(
    bounds: tuple[float, ...], values: list[float]
) -> None:
    histogram = Histogram(bounds)
    for value in values:
        histogram.note(value)
    below = 0
    for bound, count in zip(bounds, histogram.counts, strict=False):
        below += count
        assert below == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values))


@given(durations)
def test_the_summary_is_of_the_last_hundred(seconds: list[float]) -> None:
    timings = Durations("api", BRIEF)
    for each in seconds:
        timings.note("send", each)
    last = seconds[-KEPT:]
    assert timings.summary() == {
        "api send": {
            "count": len(last),
            "mean_ms": pytest.approx(sum(last) / len(last) * 1000, abs=0.001),
            "max_ms": pytest.approx(max(last) * 1000, abs=0.001),
            "slow": 0,
        }
    }
    assert sum(timings.histograms["send"].counts) == len(seconds)


def test_operations_are_told_apart_and_nothing_is_told_of_what_never_ran() -> None:
    timings = Durations("api", BRIEF)
    assert timings.summary() == {}
    timings.note("send", 0.001)
    timings.note("look", 0.002)
    assert {name: one["max_ms"] for name, one in timings.summary().items()} == {
        "api send": 1.0,
        "api look": 2.0,
    }


def test_slow_ones_are_counted_for_good_and_each_is_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    timings = Durations("api", BRIEF)
    for seconds in (SLOW_SECONDS, SLOW_SECONDS + 0.01, 7.5, *[0.0] * KEPT):
        timings.note("send", seconds)
    summary = timings.summary()["api send"]
    assert (summary["slow"], summary["max_ms"]) == (2, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "slow operation api send took 7.50 s" in caplog.text
