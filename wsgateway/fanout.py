"""Writes to many members at once, joined per turn of the loop.

Only this module decides when a group's message is written. What is posted within one turn is written
at its end; consecutive messages of one group become one write per member, so that a burst costs one
system call per member and not one per message, and a single message is not delayed. Its frame is
made once for all members that have it made alike. It knows members only as something that takes
bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Protocol

from wsgateway.config import Config
from wsgateway.hub import Hub
from wsgateway.metrics import Metrics
from wsgateway.wire import Framing

SLICE_SECONDS = 0.01
"""A fan-out yields to the loop after that long: a fifth of the longest stall that is allowed."""

JOINED_BYTES = 65_536
"""Messages that go together to a group, in all: joining more saves no time, and to compress more for
a few window sizes would take longer than a slice."""

GATHER_SECONDS_PER_MEMBER = 1.5e-7
"""How long a message waits for others of its group, about 3 % of the time that writing it takes: what
comes from Redis in bursts arrives in pieces, and each piece would cost a write per member."""

MEMBERS_PER_LOOK = 64
"""Members written to between two looks at the clock, about a quarter of a millisecond."""


class Member(Protocol):
    """Something in a group that takes bytes.

    ``frame`` makes them of a message; members that have the same one share what it makes.
    """

    frame: Framing

    def __hash__(self) -> int: ...

    def push(self, data: bytes) -> bool:
        """Put bytes on the way; False if they cannot go. Never waits."""
        ...


class Delivery:
    """What became of one message on this instance.

    ``matched`` members were in the group when it was accepted. Awaiting it (cancelling is safe)
    waits until every one was written to or given up, a few milliseconds at most per thousand
    members, never for a device; then ``written`` and ``dropped`` add up to ``matched``.
    """

    __slots__ = ("_callbacks", "_done", "matched", "written")

    def __init__(self, matched: int) -> None:
        self.matched = matched
        self.written = 0
        self._callbacks: tuple[Callable[[Delivery], None], ...] = ()
        self._done: asyncio.Future[None] | bool = matched == 0

    @property
    def dropped(self) -> int:
        """Members that did not get it: gone meanwhile, or too slow."""
        return self.matched - self.written

    def finish(self, written: int) -> None:
        """Say how many got it."""
        self.written = written
        if isinstance(self._done, asyncio.Future):
            if not self._done.done():
                self._done.set_result(None)
        else:
            self._done = True
        for callback in self._callbacks:
            callback(self)
        self._callbacks = ()

    def then(self, callback: Callable[[Delivery], None]) -> None:
        """Call once it is done, at once if it is."""
        if self._done is True or (self._done is not False and self._done.done()):
            callback(self)
        else:
            self._callbacks += (callback,)

    def __await__(self) -> Generator[object, None, Delivery]:
        if self._done is False:
            self._done = asyncio.get_running_loop().create_future()
        if isinstance(self._done, asyncio.Future):
            yield from asyncio.shield(self._done).__await__()
        return self


class _Batch:
    """Messages that go to one group together."""

    __slots__ = (
        "deliveries",
        "framed",
        "group",
        "members",
        "payloads",
        "ripe_at",
        "size",
        "written",
    )

    def __init__(self, group: str, ripe_at: float) -> None:
        self.group = group
        self.ripe_at = ripe_at
        self.payloads: list[bytes] = []
        self.size = 0  # of the payloads, in bytes
        self.framed: dict[Framing, bytes] = {}  # their frames joined, as members need them
        self.deliveries: list[Delivery] = []
        self.members: list[Member] | None = None  # None while more may be added
        self.written = 0

    def joined(self, frame: Framing) -> bytes:
        """The frames of all its messages, made once."""
        data = self.framed.get(frame)
        if data is None:
            data = self.framed[frame] = b"".join(map(frame, self.payloads))
        return data


class Fanout:
    """The messages on their way to groups, in the order they were posted."""

    def __init__(self, hub: Hub[Member], metrics: Metrics, max_bytes: int) -> None:
        self._hub = hub
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._bytes = 0
        self._batches: deque[_Batch] = deque()
        self._scheduled = False

    def configure(self, config: Config) -> None:
        """Take another bound for what is posted from now on."""
        self._max_bytes = config.limits.fanout_bytes

    def post(self, group: str, payload: bytes) -> Delivery:
        """Send a message to everybody who is in a group now. Never waits.

        Where too many bytes are on the way already, nobody gets it, and it is counted.
        """
        delivery = Delivery(len(self._hub.members(group)))
        self._metrics.group_messages += 1
        if delivery.matched == 0:
            return delivery
        size = len(payload)
        if self._bytes + size > self._max_bytes:
            self._metrics.dropped["fanout_full"] += delivery.matched
            delivery.finish(0)
            return delivery
        batch = self._batches[-1] if self._batches else None
        if (
            batch is None
            or batch.group != group
            or batch.members is not None
            or batch.size + size > JOINED_BYTES
        ):
            gather = delivery.matched * GATHER_SECONDS_PER_MEMBER
            batch = _Batch(group, time.perf_counter() + gather)
            self._batches.append(batch)
        batch.payloads.append(payload)
        batch.size += size
        batch.deliveries.append(delivery)
        self._bytes += size
        self._schedule()
        return delivery

    def freeze(self, group: str) -> None:
        """Fix who gets what was posted so far. To be called before a member joins the group."""
        for batch in self._batches:
            if batch.group == group and batch.members is None:
                batch.members = list(self._hub.members(group))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        try:
            self._write_slice()
        finally:  # whatever one member did, the others get their turn
            if self._batches:
                self._schedule()

    def _write_slice(self) -> None:
        deadline = time.perf_counter() + SLICE_SECONDS
        while self._batches:
            batch = self._batches[0]
            if batch.members is None:
                if batch is self._batches[-1] and time.perf_counter() < batch.ripe_at:
                    return
                batch.members = list(self._hub.members(batch.group))
            frame: Framing | None = None
            data, is_late = b"", False
            while batch.members:
                member = batch.members.pop()
                if member.frame is not frame:
                    frame = member.frame
                    data = batch.joined(frame)  # may have compressed 64 KiB
                    is_late = time.perf_counter() > deadline
                batch.written += member.push(data)
                if len(batch.members) % MEMBERS_PER_LOOK == 0:
                    is_late = time.perf_counter() > deadline
                if is_late:
                    break
            if batch.members:
                self._metrics.fanout_slices += 1
                return
            self._batches.popleft()
            self._finish(batch)
            if self._batches and time.perf_counter() > deadline:
                self._metrics.fanout_slices += 1
                return

    def _finish(self, batch: _Batch) -> None:
        metrics = self._metrics
        metrics.delivered += batch.written * len(batch.payloads)
        metrics.sent["group"] += batch.written * len(batch.payloads)
        self._bytes -= batch.size
        for delivery in batch.deliveries:
            delivery.finish(batch.written)
            if delivery.dropped:
                metrics.dropped["member_gone"] += delivery.dropped
