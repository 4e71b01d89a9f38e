"""The queue: a Redis list that backends push messages for users to.

Only this module knows the list's items. It knows neither sockets nor SQL. One instance at a time
takes items, under a lease, so that their order holds. An item waits in a list of the instance's own
until it was sent, so that an instance that is killed loses none: whoever gets the lease next puts it
back first. What cannot be sent goes to a list of rejected items, with the reason.

    {"user_id": 1, "message": {...}, "timestamp": ...}      an item, as producers LPUSH it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Any, Final, Literal

import orjson

from wsgateway import config, envelope, wire
from wsgateway.envelope import Fate
from wsgateway.gateway import user_group
from wsgateway.link import Command, Pipeline
from wsgateway.metrics import Metrics
from wsgateway.sends import Sends

log = logging.getLogger(__name__)

LEASE_MS: Final = 10_000
"""How long nobody else takes items after the holder was killed."""

RENEW_SECONDS: Final = 3.0
"""How often the lease is renewed, and asked for by those who do not hold it."""

POP_SECONDS: Final = 1
"""How long one look for an item lasts; shorter than Redis may take to answer."""

RETRY_PAUSE: Final = 0.5
"""Seconds until an item is sent again that did not get through to Redis."""

STOP_SECONDS: Final = 3.0
"""How long an instance that stops may take for the item in hand: a look and a send."""

REJECTED_BYTES: Final = 10_240
"""Bytes of a bad item that are kept."""

_IF_OURS = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call({}) end return 0"
_RENEW = _IF_OURS.format("'pexpire', KEYS[1], ARGV[2]")
_RELEASE = _IF_OURS.format("'del', KEYS[1]")


class Rejected(Exception):
    """An item that cannot be sent; the text is the reason."""


class Ingest:
    """Takes items from the queue and sends them."""

    def __init__(
        self,
        settings: config.Queue,
        pipeline: Pipeline,
        popper: Pipeline,
        sends: Sends,
        exists: Callable[[Literal["user"], int], Awaitable[bool]],
        prefix: str,
        name: str,
        epoch: str,
        max_message: int,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._popper = popper  # of its own, as popping waits
        self._sends = sends
        self._exists = exists
        self._max_message = max_message
        self._metrics = metrics
        self._holder = f"{name}:{epoch}"
        self._lease = f"{prefix}queue:lease"
        self._instances = f"{prefix}instances"
        self._holders = f"{prefix}queue:holders"  # who may have an item in hand
        self._name = name
        self._prefix = prefix
        self._processing = self._processing_of(name)
        self._rejected = f"{prefix}rejected"
        self._held_until = 0.0
        self._stopping = False
        self._stopped = asyncio.Event()

    def configure(self, config: config.Config) -> None:
        """Take other bounds for the items to come."""
        self._settings = config.queue
        self._max_message = config.limits.message_bytes

    @property
    def holds_lease(self) -> bool:
        """Whether this instance is the one that takes items."""
        return monotonic() < self._held_until

    async def size(self) -> dict[str, int]:
        """``{"waiting", "rejected"}``. Raises ConnectionError."""
        waiting, rejected = await self._call(
            ("LLEN", self._settings.name), ("LLEN", self._rejected)
        )
        return {"waiting": waiting, "rejected": rejected}

    async def enqueue(self, user_id: int, message: Mapping[str, Any]) -> int:
        """Put a message into the queue; how many wait. Raises ConnectionError."""
        item = {"user_id": user_id, "message": message, "timestamp": wire.timestamp()}
        return int((await self._call(("LPUSH", self._settings.name, orjson.dumps(item))))[0])

    async def clear(self) -> int:
        """Throw away what waits; how many. Raises ConnectionError."""
        waiting, _ = await self._call(("LLEN", self._settings.name), ("DEL", self._settings.name))
        return int(waiting)

    async def run(self) -> None:
        """Take items whenever this instance holds the lease, until it stops."""
        while not self._stopping:
            try:
                if not self.holds_lease and not await self._acquire():
                    await asyncio.sleep(RENEW_SECONDS)
                    continue
                await self._take()
            except ConnectionError:  # Redis is away, as its pipeline has told the log
                await asyncio.sleep(RETRY_PAUSE)
        self._stopped.set()

    async def stop(self) -> None:
        """Finish the item in hand, if that is soon done, and let another instance take the next."""
        if not self.holds_lease:
            return
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._stopped.wait()
        self._held_until = 0.0
        await self._pipeline.submit(lambda: [("EVAL", _RELEASE, 1, self._lease, self._holder)])

    async def _call(self, *commands: Command) -> list[Any]:
        """What Redis answers. Raises ConnectionError where it is away or refuses."""
        replies = await self._pipeline.call(*commands)
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            raise ConnectionError("refused") from refused
        return replies

    async def _acquire(self) -> bool:
        asked_at = monotonic()
        reply = (
            await self._pipeline.call(("SET", self._lease, self._holder, "NX", "PX", LEASE_MS))
        )[0]
        if reply not in (b"OK", "OK"):
            return False
        log.info("queue taken over name=%s", self._settings.name)
        await self._call(("SADD", self._holders, self._name))
        await self._put_back()
        self._held_until = asked_at + LEASE_MS / 1000
        return True

    async def _put_back(self) -> None:
        """Put back what others, or we before a crash, had in hand: oldest to the front."""
        holders, instances = await self._call(
            ("SMEMBERS", self._holders), ("ZRANGE", self._instances, 0, -1)
        )
        for name in {name.decode() for name in (*holders, *instances)}:
            move = ("LMOVE", self._processing_of(name), self._settings.name, "LEFT", "RIGHT")
            while (await self._call(move))[0] is not None:
                self._metrics.queue_items["put_back"] += 1
            if name != self._name:
                await self._call(("SREM", self._holders, name))

    def _processing_of(self, name: str) -> str:
        return f"{self._prefix}processing:{name}"

    async def _take(self) -> None:
        """Take items and send them, one at a time, until the lease is to be renewed."""
        renew_at = self._held_until - LEASE_MS / 1000 + RENEW_SECONDS
        done: bytes | None = None
        while True:
            removal = [("LREM", self._processing, 1, done)] if done is not None else []
            pop = ("LMOVE", self._settings.name, self._processing, "RIGHT", "LEFT")
            item = (await self._popper.call(*removal, pop))[-1]
            done = None
            if item is None:
                wait = ("BLMOVE", *pop[1:], POP_SECONDS)
                item = (await self._popper.call(wait))[0]
            if isinstance(item, Exception):
                log.error("the queue cannot be read: %s is no list?", self._settings.name)
                await asyncio.sleep(RENEW_SECONDS)
            elif item is not None:
                # Else it stays in our list: whoever holds the lease puts it back.
                if not self.holds_lease or not await self._handle(item):
                    return
                done = item
            if self._stopping or monotonic() > renew_at or not self.holds_lease:
                if done is not None:
                    await self._popper.call(("LREM", self._processing, 1, done))
                if not self._stopping:
                    await self._renew()
                return

    async def _renew(self, *, in_hand: bool = False) -> None:
        asked_at = monotonic()
        reply = (
            await self._pipeline.call(("EVAL", _RENEW, 1, self._lease, self._holder, LEASE_MS))
        )[0]
        self._held_until = asked_at + LEASE_MS / 1000 if reply == 1 else 0.0
        if self.holds_lease and not in_hand:
            await self._put_back()  # what a connection that was cut took after its end
        size = await self.size() if self.holds_lease else {"waiting": 0, "rejected": 0}
        self._metrics.queue_waiting = float(size["waiting"])
        self._metrics.queue_rejected = float(size["rejected"])

    async def _handle(self, item: bytes) -> bool:
        """Send an item, or put it where bad ones go; False if the lease was lost before that."""
        try:
            user_id, payload = self._read(item)
            if not await self._exists("user", user_id):
                raise Rejected("no such user")
        except Rejected as error:
            await self._reject(item, str(error))
            return True
        message_id = envelope.new_id(envelope.ITEM)
        while self.holds_lease:
            receipt = await self._sends.send(user_group(user_id), payload, message_id, 2.0)
            if receipt.fate is Fate.TAKEN:
                self._metrics.queue_items["sent"] += 1
                return True
            await asyncio.sleep(RETRY_PAUSE)  # who got it already drops the repetition
            await self._renew(in_hand=True)
        return False

    def _read(self, item: bytes) -> tuple[int, bytes]:
        """The user and the message, as JSON, of an item. Raises Rejected."""
        try:
            document = wire.read_object(item)
        except ValueError:
            raise Rejected("not a JSON object") from None
        user_id, message = document.get("user_id"), document.get("message")
        if isinstance(user_id, str) and user_id.isdecimal() and len(user_id) < 19:
            user_id = int(user_id)
        if type(user_id) is not int or user_id < 0:
            raise Rejected("user_id is no number")
        if not isinstance(message, dict):
            raise Rejected("message is no object")
        payload = wire.encode(message)
        if len(payload) > self._max_message:
            raise Rejected("message is too long")
        return user_id, payload

    async def _reject(self, item: bytes, reason: str) -> None:
        self._metrics.queue_items["rejected"] += 1
        log.warning("queue item rejected reason=%s", reason)
        text = item[:REJECTED_BYTES].decode(errors="replace")
        record = orjson.dumps({"reason": reason, "item": text, "timestamp": wire.timestamp()})
        await self._pipeline.call(
            ("LPUSH", self._rejected, record),
            ("LTRIM", self._rejected, 0, self._settings.rejected - 1),
        )
