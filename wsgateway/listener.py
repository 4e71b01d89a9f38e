"""The door: the listening socket, deadlines, the keepalive wheel, and the way out.

Only this module knows all connections of an instance and when something is due for one. Nothing
runs per idle connection: one tick looks at the oldest handshakes, the closing and the congested
connections, and at the part of the wheel whose turn it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import AsyncIterator
from functools import partial
from time import monotonic

from wsgateway import background, drain, sockets
from wsgateway.admission import Admission
from wsgateway.auth import Authenticator, Identity
from wsgateway.config import Config
from wsgateway.connection import Connection, Phase
from wsgateway.deflate import Deflate
from wsgateway.errors import StoreError
from wsgateway.gate import Gate
from wsgateway.gateway import Gateway
from wsgateway.handshake import Route, Visit
from wsgateway.health import Health
from wsgateway.metrics import Metrics
from wsgateway.providers import Services
from wsgateway.proxy import Networks
from wsgateway.sockets import Acceptor, Preamble
from wsgateway.tls import Tls
from wsgateway.wire import CloseCode

log = logging.getLogger(__name__)

TICK = 0.1
"""Seconds between two looks at what is due: the error of every deadline."""

ABORT_SECONDS = 1.0
"""How long aborted connections may take to be gone; a turn of the loop in practice."""

RECHECK_PAUSE = 1.0
"""Seconds until tokens are compared again where the database could not say."""

BATCH = 200
"""Connections closed or checked at once, about 10 ms, before others get their turn."""

OUR_CODES = frozenset({1000, 1001, 1002, 1005, 1006, 1007, 1008, 1009, 1011, 1012, *CloseCode})
"""Close codes that are counted by name; a peer may send 4,000 others."""

REASONS = {"device": CloseCode.RESTART}
"""Close codes of a token's changes other than its end: a device that moved is to come back."""


class Listener:
    """The device socket of one instance; what connections call is the `Door` port."""

    def __init__(
        self,
        config: Config,
        admission: Admission,
        authenticator: Authenticator,
        gateway: Gateway,
        services: Services,
        health: Health,
        metrics: Metrics,
        max_connections: int,
        tls: Tls | None,
    ) -> None:
        self.limits = config.limits
        self.deflate = Deflate(config.compression, metrics) if config.compression.enabled else None
        trusted = config.server.trusted_proxies
        self.proxies = Networks(trusted) if trusted else None
        self.max_pending = config.handlers.max_pending
        self.metrics = metrics
        self.services = services
        self.gateway = gateway
        self._config = config
        self._admission = admission
        self._authenticator = authenticator
        self._max_connections = max_connections
        self._health = health
        self._gate = Gate(metrics)
        self._preamble = self._make_preamble(tls)
        self._connections: set[Connection] = set()
        self._handshakes: dict[Connection, float] = {}  # with the deadline, oldest first
        self._closing: dict[Connection, float] = {}  # with the deadline, oldest first
        self._congested: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._recheck = asyncio.Event()
        self._all_gone = asyncio.Event()
        slots = max(1, round(config.keepalive.interval / TICK))
        self._wheel: list[set[Connection]] = [set() for _ in range(slots)]
        self._next_slot = 0
        self._allowed_silence = math.ceil(config.keepalive.timeout / config.keepalive.interval)

    def configure(self, config: Config) -> None:
        """Go by another configuration: deadlines that run stay, those of later steps are the new.

        Who is connected beyond a new limit stays; it decides about those who come.
        """
        self._config = config
        self.limits = config.limits
        self.max_pending = config.handlers.max_pending
        self._allowed_silence = math.ceil(config.keepalive.timeout / config.keepalive.interval)
        slots = max(1, round(config.keepalive.interval / TICK))
        if slots != len(self._wheel):
            self._turn_into(slots)

    def resize(self, max_connections: int) -> None:
        """Let so many connections in, from now on."""
        self._max_connections = max_connections

    @property
    def connections(self) -> int:
        """Connections that are open, in their handshake or closing."""
        return len(self._connections)

    def recheck_tokens(self) -> None:
        """Soon compare every connection's token with the database, which has changed."""
        self._recheck.set()

    @contextlib.asynccontextmanager
    async def open(
        self, passed: socket.socket | None = None
    ) -> AsyncIterator[list[tuple[str, int]]]:
        """Listen; the addresses. On leaving, nobody is accepted any more and everybody is gone.

        ``passed`` is a socket that listens already, in place of the configured address.

        Raises:
            StartError: the address cannot be listened on.

        """
        server = self._config.server
        listening = await sockets.listen(
            server.host,
            server.port,
            server.backlog,
            "stop what uses it, or set server.port",
            reuse_port=server.reuse_port,
            passed=passed,
        )
        self._acceptor = Acceptor(
            listening, partial(Connection, self), self._preamble, shared=passed is not None
        )
        async with background.running(self._tick(), self._cut_ended()):
            try:
                await self._acceptor.start(server.backlog)
                yield self._acceptor.addresses
                # Who looks at /readyz is to send newcomers elsewhere before they are refused here.
                self._health.leaving = True
                await asyncio.sleep(self._config.drain.delay)
                await self._acceptor.stop()
                await self._drain()
            finally:
                await self._acceptor.close()
                for task in self._tasks:
                    task.cancel()
                for connection in list(self._connections):
                    connection.abort("drain")
                await self._gone(ABORT_SECONDS)

    def _make_preamble(self, tls: Tls | None) -> Preamble | None:
        """What comes before a request, if anything."""
        server = self._config.server
        if tls is None and not server.proxy_protocol:
            return None
        return Preamble(
            tls=tls,
            proxies=self.proxies if server.proxy_protocol else None,
            bounds=lambda: (self.limits.handshake_timeout, self.limits.handshakes),
            has_room=lambda entering: len(self._connections) + entering <= self._most,
            metrics=self.metrics,
        )

    @property
    def _most(self) -> int:
        """Connections that are not cut at once; those beyond ``max_connections`` are answered."""
        return self._max_connections + self.limits.descriptor_reserve // 2

    # The Door port.

    def arrived(self, connection: Connection) -> None:
        """A connection was accepted."""
        self.metrics.accepted += 1
        self._connections.add(connection)
        self._admission.enter(connection)
        self._handshakes[connection] = connection.opened_at + self.limits.handshake_timeout
        connection.wheel_slot = self.metrics.accepted % len(self._wheel)
        if len(self._connections) > self._most:
            self.metrics.refused["descriptors"] += 1
            connection.abort("descriptors")

    def moved(self, connection: Connection, address: str) -> None:
        """A trusted proxy told for whom a connection is."""
        if address != connection.address:
            self._admission.move(connection, address)

    def requested(self, connection: Connection, visit: Visit) -> None:
        """A connection's request is complete."""
        refusal = None
        if self._admission.draining:
            refusal = "draining"
        elif len(self._connections) > self._max_connections:
            refusal = "full"
        elif len(self._handshakes) > self.limits.handshakes:
            refusal = "handshakes"
        elif self._admission.crowded(connection):
            refusal = "address_full"
        self._keep(asyncio.create_task(self._decide(connection, visit, refusal)))

    def congested(self, connection: Connection) -> None:
        """A connection's peer reads more slowly than is written."""
        self._congested.add(connection)

    def closing(self, connection: Connection) -> None:
        """A connection said its last word."""
        self._handshakes.pop(connection, None)
        self._closing.setdefault(connection, monotonic() + self._config.keepalive.close_timeout)

    def spawn(self, connection: Connection) -> asyncio.Task[None]:
        """Run a connection's handlers."""
        return self._keep(asyncio.create_task(connection.work()))

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self._handshakes.pop(connection, None)
        self._closing.pop(connection, None)
        self._congested.discard(connection)
        self._wheel[connection.wheel_slot].discard(connection)
        self._admission.leave(connection)
        if not self._connections:
            self._all_gone.set()
        if connection.identity is not None:
            code = connection.close_code
            self.metrics.closed[str(code) if code in OUR_CODES else "other"] += 1
            seconds = monotonic() - connection.opened_at
            self.metrics.connection_seconds.note(seconds)
            log.info(
                "device out user=%s device=%s code=%s seconds=%.1f messages=%s id=%s",
                connection.user_id, connection.device_id, code,
                seconds, connection.messages, connection.id,
            )  # fmt: skip

    # What is due.

    async def _decide(self, connection: Connection, visit: Visit, refusal: str | None) -> None:
        if not self._gate.is_open and visit.route is Route.DEVICE and refusal is None:
            if not await self._gate.enter():
                refusal = "overload"
            if connection.phase is not Phase.DECIDING:
                return
        accepted_at = connection.opened_at
        await self._admission.decide(connection, visit, refusal)
        if connection.phase is Phase.OPEN:
            self.metrics.handshake_seconds.note(connection.opened_at - accepted_at)
            self._handshakes.pop(connection, None)
            self._wheel[connection.wheel_slot].add(connection)

    async def _tick(self) -> None:
        """Look at what is due, for ever. A late tick makes up for the slots it missed."""
        next_slot_at = monotonic()
        while True:
            limits = self.limits
            slot_seconds = self._config.keepalive.interval / len(self._wheel)
            pause = min(TICK, slot_seconds)
            due = monotonic() + pause
            await asyncio.sleep(pause)
            now = monotonic()
            lag = max(0.0, now - due)
            self.metrics.loop_lag_seconds.note(lag)
            self._health.note_lag(lag)
            self._gate.tick(lag, limits.handshake_lag, limits.handshake_wait)
            self._expire(self._handshakes, now, "handshake_timeout")
            self._expire(self._closing, now, "close_timeout")
            self._cut_stalled(now)
            missed = 0
            while next_slot_at <= now and missed < len(self._wheel):
                next_slot_at += slot_seconds
                missed += 1
                await self._visit_slot()
            if missed == len(self._wheel):
                next_slot_at = now + slot_seconds

    def _expire(self, deadlines: dict[Connection, float], now: float, reason: str) -> None:
        late = []
        for connection, deadline in deadlines.items():
            if deadline <= now:
                late.append(connection)
            elif self._preamble is None:
                break  # they are in order, unless a preamble took some longer than others
        for connection in late:
            del deadlines[connection]
            if reason == "handshake_timeout":
                self.metrics.refused[reason] += 1
            connection.abort(reason)

    def _cut_stalled(self, now: float) -> None:
        for connection in list(self._congested):
            if not connection.is_congested:
                self._congested.discard(connection)
            elif connection.stalled(now, self.limits.outbound_stall):
                connection.abort("stalled")

    def _turn_into(self, slots: int) -> None:
        """Spread everybody anew over a wheel of so many slots."""
        pinged = set().union(*self._wheel)
        self._wheel = [set() for _ in range(slots)]
        self._next_slot %= slots
        for number, connection in enumerate(self._connections):
            connection.wheel_slot = number % slots
            if connection in pinged:
                self._wheel[connection.wheel_slot].add(connection)

    async def _visit_slot(self) -> None:
        slot = self._wheel[self._next_slot]
        self._next_slot = (self._next_slot + 1) % len(self._wheel)
        wall = time.time()
        for number, connection in enumerate(list(slot), 1):
            identity = connection.identity
            if identity and identity.expires_at is not None and identity.expires_at <= wall:
                connection.close(CloseCode.TOKEN_ENDED, "expired")
            elif not connection.keepalive(self._allowed_silence):
                connection.close(CloseCode.NO_PONG, "no pong in time")
            if number % BATCH == 0:
                await asyncio.sleep(0)

    async def _cut_ended(self) -> None:
        """After a change of the database, end the connections whose token it ended."""
        while True:
            await self._recheck.wait()
            self._recheck.clear()
            holders: dict[Identity, list[Connection]] = {}
            for connection in self._connections:
                if connection.identity is not None and connection.phase is Phase.OPEN:
                    holders.setdefault(connection.identity, []).append(connection)
            try:
                changed = await self._authenticator.changed(holders)
            except StoreError:
                await asyncio.sleep(RECHECK_PAUSE)  # paces the tries while the database is away
                self._recheck.set()
                continue
            cut = [(one, why) for identity, why in changed.items() for one in holders[identity]]
            for number, (connection, reason) in enumerate(cut, 1):
                connection.close(REASONS.get(reason, CloseCode.TOKEN_ENDED), reason)
                if number % BATCH == 0:
                    await asyncio.sleep(0)

    async def _drain(self) -> None:
        """Send every device away, then wait until they are gone, within the window in all."""
        self._admission.draining = True
        settings = self._config.drain
        end = monotonic() + settings.window
        log.info("draining connections=%s seconds=%g", len(self._connections), settings.window)
        await drain.send_away(list(self._connections), settings)
        await self._gone(end - monotonic())

    async def _gone(self, seconds: float) -> None:
        """Wait until every connection is gone, but not for longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._acceptor.settled()
                self._all_gone.clear()
                if self._connections:
                    await self._all_gone.wait()

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a connection's task failed", exc_info=task.exception())
