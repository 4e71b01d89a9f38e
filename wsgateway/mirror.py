"""Group traffic through Redis pub/sub: what is sent here reaches the members of other instances.

Only this module knows channels. It knows neither sockets nor SQL. One task owns the subscriber's
connection; everything is published through one pipeline, so that order holds. A message is
published at most once and never repeated; what is lost on the way is counted by the receiver from
the numbers in the headers.

The mirror proves itself: each second it publishes a probe through the same connections and must
hear it. A subscription is made for each group that somebody wants, in batches, and confirmed by
Redis before anybody is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Final

from wsgateway import envelope
from wsgateway.envelope import BadEnvelope, Beat, Envelope, Fate, Published, Resync
from wsgateway.gateway import ALL
from wsgateway.ledger import Received, Sent
from wsgateway.link import (
    Command,
    Condition,
    Connection,
    Deaf,
    Outcome,
    Pipeline,
    Redis,
    State,
    state_of,
    stay,
)
from wsgateway.metrics import Metrics
from wsgateway.subscriptions import Confirmation, Subscriptions

log = logging.getLogger(__name__)

PROBE_INTERVAL: Final = 1.0
"""Seconds between two probes."""

RETRY_INTERVAL: Final = 0.1
"""Seconds between two probes while nothing can be published."""

DEAF_SECONDS: Final = 5.0
"""Seconds without hearing anything, while publishing works, after which the subscriber reconnects."""

BEAT_INTERVAL: Final = 2.0
"""Seconds between two beats, so that a loss at the tail is noticed too."""

SETTLE_SECONDS: Final = 0.3
"""How long the others may take to say that they are alive after the mirror came up: they are asked."""

LINGER_SECONDS: Final = 5.0
"""How long a group that nobody wants stays subscribed: a device that reconnects finds it."""

BATCH: Final = 500
"""Channels in one SUBSCRIBE, about 20 KB."""

GROUPS_TTL: Final = 15
"""Seconds after its last beat that an instance is still believed to listen."""

SLICE_SECONDS: Final = 0.01
"""How long messages are handled before others get their turn."""


class Mirror:
    """One instance's ear and mouth on Redis."""

    def __init__(
        self,
        redis: Redis,
        pipeline: Pipeline,
        name: str,
        epoch: str,
        prefix: str,
        max_message: int,
        metrics: Metrics,
    ) -> None:
        self._redis = redis
        self._pipeline = pipeline
        self._name = name
        self._epoch = epoch
        self._prefix = prefix
        self.max_message = max_message
        """Bytes of the longest message of another instance that is passed on."""
        self._metrics = metrics
        self._sent = Sent(epoch)
        self._received = Received()
        self._condition = Condition("subscriber", metrics)
        self._heard_at = self._probe_sent_at = 0.0
        self._proved_at = self._up_since = monotonic()
        self._probe_prefix, self._probe_sent = f"probe {epoch} ".encode(), b""
        self._repeated_at = 0.0
        self.first_up = asyncio.Event()
        """Set once the mirror works for the first time."""
        self.turned_at = monotonic()
        """When its task went on last, also while Redis is away; a stuck one does not."""
        self._beat_is_due = asyncio.Event()
        self._noted = False
        """Whether Redis knows which groups this instance listens to, and no others."""
        self._all, self._own = self.channel(ALL), self.node(name)
        self._subscriptions = Subscriptions([self._all, self._own])
        self._deliver: Callable[[str, Envelope | bytes], None]
        self._on_node: Callable[[bytes], None]
        self._on_beat: Callable[[str], None]
        self._on_up: Callable[[], None]

    @property
    def is_up(self) -> bool:
        """Whether a probe that was published after subscribing came back, and lately."""
        return self._condition.is_up and self._pipeline.condition.is_up

    @property
    def is_settled(self) -> bool:
        """Whether it is up for long enough to have heard from every other instance."""
        return self.is_up and monotonic() - self._up_since > SETTLE_SECONDS

    @property
    def silence(self) -> float:
        """Seconds since a probe came back."""
        return monotonic() - self._proved_at

    def channel(self, group: str) -> str:
        """The channel of a group."""
        return f"{self._prefix}all" if group == ALL else f"{self._prefix}group:{group}"

    def node(self, name: str) -> str:
        """The channel of an instance."""
        return f"{self._prefix}node:{name}"

    def publish(
        self, group: str, payload: bytes, message_id: str, others: Sequence[str] = ()
    ) -> asyncio.Future[Published]:
        """Send a message to the other instances. Never waits.

        The answer says which of ``others`` listen to the group, as Redis knew just before.
        """
        channel = self.channel(group)
        asked = () if group == ALL else others

        def build() -> list[Command]:
            epoch, seq = self._sent.next(channel)
            data = envelope.seal(self._name, epoch, seq, message_id, payload)
            questions = (("SMISMEMBER", self._groups_of(name), ALL, group) for name in asked)
            return [*questions, ("PUBLISH", channel, data)]

        published: asyncio.Future[Published] = asyncio.get_running_loop().create_future()

        def settle(done: asyncio.Future[Outcome]) -> None:
            fate, replies = done.result()
            if replies and isinstance(replies[-1], Exception):
                fate = Fate.REFUSED
            self._metrics.mirror_published[fate.value] += 1
            # Without an entry for everybody, Redis has lost the set: then it may well listen.
            listening = [
                name for name, reply in zip(asked, replies, strict=False) if reply != [1, 0]
            ]
            if not published.done():
                published.set_result(
                    Published(fate, frozenset(others if group == ALL else listening))
                )

        self._pipeline.submit(build, len(payload)).add_done_callback(settle)
        return published

    def tell(self, name: str, data: bytes) -> asyncio.Future[Outcome]:
        """Send a word to one instance."""
        return self._pipeline.submit(lambda: [("PUBLISH", self.node(name), data)], len(data))

    def want(self, groups: Iterable[str]) -> list[Confirmation]:
        """Subscribe to groups soon; what to wait for until Redis has confirmed each."""
        return self._subscriptions.want(map(self.channel, groups))

    def unwant(self, groups: Iterable[str]) -> None:
        """Nobody wants groups any more: unsubscribe after a while."""
        self._subscriptions.unwant(map(self.channel, groups), monotonic())

    async def run(
        self,
        deliver: Callable[[str, Envelope | bytes], None],
        on_node: Callable[[bytes], None],
        on_beat: Callable[[str], None],
        on_up: Callable[[], None],
    ) -> None:
        """Listen for ever.

        ``deliver`` is called with a group and what came for it: another instance's message, or the
        JSON of any other program's; ``on_node`` with each word to this instance; ``on_beat`` with
        the name of an instance that is alive; ``on_up`` whenever the mirror begins to work.
        """
        self._deliver, self._on_node, self._on_beat = deliver, on_node, on_beat
        self._on_up = on_up
        async with asyncio.TaskGroup() as group:
            group.create_task(stay(self._condition, self._session))
            group.create_task(self._beat())

    async def _session(self) -> None:
        self.turned_at = monotonic()
        self._subscriptions.reconnected()
        async with self._redis.connected("subscriber") as connection:
            self._heard_at = monotonic()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read(connection))
                    group.create_task(self._subscribe(connection))
                    group.create_task(self._probe())
            finally:
                self._metrics.mirror_interruptions += self._condition.is_up
                self._subscriptions.disconnected()

    async def _read(self, connection: Connection) -> None:
        slice_ends = 0.0
        while True:
            # Without a time-out: with one, redis-py takes a dead socket for an idle one.
            kind, channel, data = await connection.read_response()
            self._heard_at = now = monotonic()
            if kind == b"message":
                self._receive(channel.decode(), data)
            elif kind == b"subscribe":
                self._subscriptions.confirm(channel.decode())
            if now > slice_ends:
                await asyncio.sleep(0)
                slice_ends = monotonic() + SLICE_SECONDS

    def _receive(self, channel: str, data: bytes) -> None:
        if channel == self._own:
            self._read_node(data)
            return
        try:
            found = envelope.read(data, self.max_message)
        except BadEnvelope as error:
            self._metrics.mirror_rejected[str(error)] += 1
            return
        if isinstance(found, Beat):
            self._catch_up(found)
            return
        if isinstance(found, Resync):
            self._on_beat(found.origin)
            if found.origin != self._name and monotonic() - self._repeated_at > BEAT_INTERVAL:
                self._repeated_at = monotonic()
                self._sent.repeat()
                self._beat_is_due.set()
            return
        if isinstance(found, Envelope):
            if found.origin == self._name and found.epoch.startswith(self._epoch):
                return  # our own echo
            # Before Redis confirmed a channel, or after it was left, nothing is counted: what comes
            # then is of the subscription before.
            counts = self._subscriptions.hears(channel)
            missing: int | None = 0
            if counts:
                missing = self._received.message(channel, found.origin, found.epoch, found.seq)
            if missing is None:
                self._metrics.mirror_duplicates += 1
                return
            self._lose(missing)
        self._metrics.mirror_received += 1
        self._deliver(self._group(channel), found)

    def _read_node(self, data: bytes) -> None:
        if not data.startswith(b"probe "):
            self._on_node(data)
        elif data == self._probe_sent:
            self._proved_at = monotonic()
            self._metrics.mirror_lag_seconds.note(self._proved_at - self._probe_sent_at)
            if not self._condition.is_up:
                self._up_since = self._proved_at
                self._beat_is_due.set()  # the others are to know it at once
                self._sent.repeat()  # and what they asked for meanwhile was not heard
                self._pipeline.submit(self._build_resync)
                self._on_up()
            self._condition.set(State.UP)
            self.first_up.set()
        elif not data.startswith(self._probe_prefix):
            self._metrics.mirror_twins += 1
            log.error("another instance is named %s too: rename one (server.instance)", self._name)

    def _catch_up(self, beat: Beat) -> None:
        self._on_beat(beat.origin)
        if beat.origin == self._name:
            return
        for channel, (epoch, last) in beat.used.items():
            if self._subscriptions.hears(channel):
                self._lose(self._received.beat(channel, beat.origin, epoch, last))

    def _lose(self, missing: int) -> None:
        if missing:
            self._metrics.mirror_gaps += 1
            self._metrics.mirror_lost += missing
            log.warning("mirror lost messages: %s did not arrive", missing)

    async def _subscribe(self, connection: Connection) -> None:
        """Make true what is wanted, a batch at a time.

        An instance says that it listens before it does: who sends then waits for an answer in vain
        rather than not at all.
        """
        subscriptions = self._subscriptions
        while True:
            while batch := subscriptions.take_unasked(BATCH):
                await self._note("SADD", batch)
                await self._command(connection, "SUBSCRIBE", batch)
            over = subscriptions.take_over(monotonic() - LINGER_SECONDS)
            for start in range(0, len(over), BATCH):
                batch = over[start : start + BATCH]
                for channel in batch:
                    self._received.forget(channel)
                await self._command(connection, "UNSUBSCRIBE", batch)
                await self._note("SREM", batch)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await subscriptions.changed.wait()
            subscriptions.changed.clear()

    async def _note(self, verb: str, channels: Iterable[str]) -> None:
        """Say in Redis which groups this instance listens to, for those who wait for its answers."""
        groups = [self._group(channel) for channel in channels if channel != self._own]
        if groups:
            key = self._groups_of(self._name)
            fate, replies = await self._pipeline.submit(lambda: [(verb, key, *groups)])
            if fate is not Fate.TAKEN or isinstance(replies[0], Exception):
                self._noted = False

    async def _command(self, connection: Connection, verb: str, channels: Sequence[str]) -> None:
        async with asyncio.timeout(self._redis.timeout):
            await connection.send_command(verb, *channels, check_health=False)

    async def _probe(self) -> None:
        """Publish to ourselves, and end the session if nothing of it arrives."""
        confirmations = self._subscriptions.want([self._own])
        if confirmations:
            await asyncio.wait(confirmations, timeout=DEAF_SECONDS)
        asked_at = monotonic()
        while True:
            self._probe_sent = self._probe_prefix + secrets.token_hex(8).encode()
            self._probe_sent_at = self.turned_at = monotonic()
            outcome = await self.tell(self._name, self._probe_sent)
            taken = self._was_taken(outcome)
            await asyncio.sleep(PROBE_INTERVAL if taken else RETRY_INTERVAL)
            now = monotonic()
            if not taken:
                asked_at = now  # whoever cannot speak must not blame his ear
            elif now - max(self._heard_at, asked_at) > DEAF_SECONDS:
                raise Deaf

    async def _beat(self) -> None:
        """Say that this instance is alive, which channels it used, and what it listens to."""
        while True:
            if not self._noted:
                await self._note_all()
            outcome = await self._pipeline.submit(self._build_beat)
            if not self._was_taken(outcome):
                self._sent.repeat()
            elif outcome.replies[-1] != 1:
                await self._note_all()  # Redis lost its data
            elif self._sent.is_used:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_INTERVAL):
                    await self._beat_is_due.wait()
            self._beat_is_due.clear()

    def _build_beat(self) -> list[Command]:
        beat = envelope.seal_beat(self._name, self._sent.take_used(envelope.BEAT_CHANNELS))
        return [
            ("PUBLISH", self.channel(ALL), beat),
            ("EXPIRE", self._groups_of(self._name), GROUPS_TTL),
        ]

    def _was_taken(self, outcome: Outcome) -> bool:
        """Whether Redis did what was asked; if it refuses, the state says so."""
        if outcome.fate is not Fate.TAKEN:
            return False
        refused = next((reply for reply in outcome.replies if isinstance(reply, Exception)), None)
        self._pipeline.condition.set(State.UP if refused is None else state_of(refused))
        return refused is None

    def _build_resync(self) -> list[Command]:
        return [("PUBLISH", self.channel(ALL), envelope.seal_resync(self._name))]

    async def _note_all(self) -> None:
        """Say anew which groups this instance listens to, and that there are no others."""
        key, channels = self._groups_of(self._name), self._subscriptions.wanted
        self._noted = (await self._pipeline.submit(lambda: [("DEL", key)])).fate is Fate.TAKEN
        for start in range(0, len(channels), BATCH):
            await self._note("SADD", channels[start : start + BATCH])

    def _groups_of(self, name: str) -> str:
        return f"{self._prefix}groups:{name}"

    def _group(self, channel: str) -> str:
        if channel == self._all:
            return ALL
        return channel.removeprefix(f"{self._prefix}group:")
