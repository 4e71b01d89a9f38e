"""What is lost, repeated, late or restarted between two instances adds up, to the last message."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgateway import ledger
from wsgateway.ledger import Received, Seen, Sent


class Arrival(NamedTuple):
    """A message, or a beat that names the last one."""

    seq: int
    is_beat: bool = False


@st.composite
def epochs(draw: st.DrawFn) -> list[tuple[int, list[Arrival]]]:
    """Lives of a sender: how many it sent, and what arrived, in which order and how often."""
    lives = []
    for _ in range(draw(st.integers(1, 3))):
        sent = draw(st.integers(1, 30))
        numbers = st.builds(Arrival, st.integers(1, sent), st.sampled_from([False] * 5 + [True]))
        lives.append((sent, draw(st.lists(numbers, max_size=60))))
    return lives


@given(epochs())
def test_lost_delivered_and_duplicates_add_up_to_what_was_sent(
    lives: list[tuple[int, list[Arrival]]],
) -> None:
    received = Received()
    base: int | None = None  # where counting began: the first that was heard of
    for number, (sent, arrivals) in enumerate(lives):
        lost = delivered = repeated = 0
        for seq, is_beat in [*arrivals, Arrival(sent, is_beat=True)]:
            if is_beat:
                lost += received.beat("c", "o", f"e{number}", seq)
                base = seq + 1 if base is None else base
                continue
            base = seq if base is None else base
            missing = received.message("c", "o", f"e{number}", seq)
            repeated += missing is None
            delivered += missing is not None
            lost += missing or 0
        assert delivered + lost == sent - base + 1
        assert delivered + repeated == sum(not one.is_beat for one in arrivals)
        base = 1  # of a sender known before, nothing of its next life is missed


@given(st.lists(st.integers(1, 50)))
def test_what_is_let_through_keeps_its_order_and_comes_once(arrivals: list[int]) -> None:
    received = Received()
    passed = [seq for seq in arrivals if received.message("c", "o", "e", seq) is not None]
    assert passed == sorted(set(passed))


@given(st.lists(st.tuples(st.sampled_from("cd"), st.sampled_from("op"), st.integers(1, 20))))
def test_channels_and_senders_are_counted_apart(arrivals: list[tuple[str, str, int]]) -> None:
    together = Received()
    alone: dict[tuple[str, str], Received] = {}
    for channel, origin, seq in arrivals:
        one = alone.setdefault((channel, origin), Received())
        expected = one.message(channel, origin, "e", seq)
        assert together.message(channel, origin, "e", seq) == expected


def test_a_channel_that_was_forgotten_begins_anew() -> None:
    received = Received()
    assert received.message("c", "o", "e", 5) == 0
    received.forget("c")
    received.forget("never known")
    assert received.message("c", "o", "e", 9) == 0
    assert received.message("c", "o", "e", 12) == 2


def test_invented_senders_do_not_fill_the_memory() -> None:
    received = Received()
    for number in range(10 * ledger.MAX_ORIGINS):
        received.message("c", f"o{number}", "e", 1)
        received.beat("c", f"p{number}", "e", 1)
    assert len(received._channels["c"]) <= ledger.MAX_ORIGINS


@given(st.lists(st.sampled_from("abc"), max_size=100))
def test_each_channel_is_numbered_from_one_without_holes(channels: list[str]) -> None:
    sent = Sent("e")
    counts: dict[str, int] = {}
    for channel in channels:
        counts[channel] = counts.get(channel, 0) + 1
        assert sent.next(channel)[1] == counts[channel]
    taken = {}
    while sent.is_used:
        part = sent.take_used(2)
        assert 0 < len(part) <= 2
        taken |= part
    assert {channel: seq for channel, (_, seq) in taken.items()} == counts
    assert sent.take_used(2) == {}


def test_a_channel_whose_count_was_forgotten_never_repeats_a_number() -> None:
    sent, used = Sent("e"), set()
    for turn in range(3):
        for channel in ("first", *(f"{turn} {number}" for number in range(ledger.MAX_SENT))):
            entry = (channel, *sent.next(channel))
            assert entry not in used
            used.add(entry)
    assert len(sent._channels) <= ledger.MAX_SENT
    assert len({epoch for channel, epoch, _ in used if channel == "first"}) == 3


@pytest.mark.parametrize("size", [1, 2, 10])
@given(data=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=60))
def test_ids_are_known_for_their_time_and_no_more_are_kept_than_fit(
    size: int, data: list[tuple[int, int]]
) -> None:
    seen: Seen[int] = Seen(size, 10)
    now = 0
    model: list[tuple[str, int]] = []
    for number, step in data:
        now += step
        model = [(one, at) for one, at in model if at + 10 > now]
        is_new = f"{number}" not in {one for one, _ in model}
        known = seen.find(f"{number}", now)
        assert known == (None if is_new else number)
        if is_new:
            seen.note(f"{number}", number, now)
            model = [*model, (f"{number}", now)][-size:]
        assert len(seen) <= size
