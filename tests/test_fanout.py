"""Writes to groups: joined per turn, in order, in slices, bounded."""

from __future__ import annotations

import asyncio

from wsgateway.fanout import Fanout, Member
from wsgateway.hub import Hub
from wsgateway.metrics import Metrics
from wsgateway.wire import Framing


class Inbox:
    """A member that keeps what it is given."""

    def __init__(self, accepts: bool = True) -> None:
        self.frame: Framing = bytes  # frames without heads
        self.writes: list[bytes] = []
        self.accepts = accepts

    def push(self, data: bytes) -> bool:
        self.writes.append(data)
        return self.accepts


def group_of(*members: Inbox, max_bytes: int = 1000) -> tuple[Hub[Member], Fanout, Metrics]:
    hub: Hub[Member] = Hub()
    for member in members:
        hub.join("g", member)
    metrics = Metrics()
    return hub, Fanout(hub, metrics, max_bytes), metrics


async def test_frames_of_one_turn_are_one_write_in_order() -> None:
    inbox = Inbox()
    _, fanout, metrics = group_of(inbox)
    deliveries = [fanout.post("g", frame) for frame in (b"1", b"2", b"3")]
    assert inbox.writes == []
    assert (await deliveries[-1]).written == 1
    assert inbox.writes == [b"123"]
    assert [(each.matched, each.written) for each in deliveries] == [(1, 1)] * 3
    assert metrics.delivered == 3


async def test_a_message_is_framed_once_for_all_who_have_it_framed_alike() -> None:
    framed: list[bytes] = []

    def shout(payload: bytes) -> bytes:
        framed.append(payload)
        return payload.upper()

    plain, loud = [Inbox(), Inbox()], [Inbox(), Inbox()]
    for each in loud:
        each.frame = shout
    _, fanout, _ = group_of(plain[0], loud[0], plain[1], loud[1])
    fanout.post("g", b"a")
    await fanout.post("g", b"b")
    assert [each.writes for each in (*plain, *loud)] == [[b"ab"], [b"ab"], [b"AB"], [b"AB"]]
    assert framed == [b"a", b"b"]


async def test_what_is_joined_is_bounded() -> None:
    inbox = Inbox()
    _, fanout, _ = group_of(inbox, max_bytes=1 << 20)
    sizes = [40_000, 20_000, 20_000, 70_000, 1]
    for size in sizes:
        last = fanout.post("g", b"x" * size)
    await last
    assert [len(write) for write in inbox.writes] == [60_000, 20_000, 70_000, 1]


async def test_order_is_kept_over_groups() -> None:
    inbox = Inbox()
    hub, fanout, _ = group_of(inbox)
    hub.join("h", inbox)
    for group, frame in (("g", b"1"), ("h", b"2"), ("g", b"3"), ("g", b"4")):
        last = fanout.post(group, frame)
    await last
    assert inbox.writes == [b"1", b"2", b"34"]


async def test_nobody_gets_what_was_sent_before_he_joined() -> None:
    early, late = Inbox(), Inbox()
    hub, fanout, _ = group_of(early)
    first = fanout.post("g", b"1")
    fanout.freeze("g")
    hub.join("g", late)
    second = fanout.post("g", b"2")
    await second
    assert (first.matched, second.matched) == (1, 2)
    assert early.writes == [b"1", b"2"]
    assert late.writes == [b"2"]


async def test_who_left_or_is_too_slow_is_counted_as_dropped() -> None:
    slow, gone = Inbox(accepts=False), Inbox()
    hub, fanout, metrics = group_of(slow, gone, Inbox())
    delivery = fanout.post("g", b"1")
    hub.leave("g", gone)
    await delivery
    assert (delivery.matched, delivery.written, delivery.dropped) == (3, 1, 2)
    assert metrics.dropped == {"member_gone": 2}


async def test_an_empty_group_costs_nothing() -> None:
    _, fanout, _ = group_of()
    delivery = await fanout.post("nobody", b"1")
    assert (delivery.matched, delivery.written, delivery.dropped) == (0, 0, 0)


async def test_what_waits_to_be_written_is_bounded() -> None:
    inbox = Inbox()
    _, fanout, metrics = group_of(inbox, max_bytes=10)
    first, second = fanout.post("g", b"x" * 10), fanout.post("g", b"y")
    assert (await second).dropped == 1
    assert metrics.dropped == {"fanout_full": 1}
    await first
    assert (await fanout.post("g", b"z")).written == 1


class SlowInbox(Inbox):
    """A member whose write takes a fifth of a millisecond of the loop's time."""

    def push(self, data: bytes) -> bool:
        until = asyncio.get_running_loop().time() + 0.0002
        while asyncio.get_running_loop().time() < until:
            pass
        return super().push(data)


async def test_a_large_fan_out_lets_others_have_their_turn() -> None:
    members = [SlowInbox() for _ in range(1000)]
    _, fanout, metrics = group_of(*members)
    delivery = fanout.post("g", b"1")
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await delivery
    counting.cancel()
    assert delivery.written == 1000
    assert metrics.fanout_slices >= 5
    assert turns >= metrics.fanout_slices


class BrokenInbox(Inbox):
    """A member that fails in a way nobody foresaw."""

    def push(self, data: bytes) -> bool:
        raise RuntimeError("unforeseen")


async def test_a_member_that_fails_does_not_end_the_fan_out() -> None:
    inbox = Inbox()
    hub, fanout, _ = group_of(inbox)
    hub.join("broken", BrokenInbox())
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    fanout.post("broken", b"1")
    last = fanout.post("g", b"2")
    assert (await last).written == 1
    assert (await fanout.post("g", b"3")).written == 1
    assert inbox.writes == [b"2", b"3"]
    assert len(failures) == 1
