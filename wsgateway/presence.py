"""Who is online, written to Redis for every other program to read.

Only this module knows those keys. An instance that stops beating is gone with all its connections
once they expire; one that comes back under the same name begins with a clean slate.

    {p}instances          zset: name -> seconds since 1970 of its last beat
    {p}alive:<name>       JSON about the instance; expires
    {p}online:<name>      hash: connection id -> {"user_id", "device_id", "since", "last_activity"}
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final

import orjson

from wsgateway import __version__, background
from wsgateway.envelope import Fate
from wsgateway.link import Command, Condition, Pipeline, State, state_of
from wsgateway.metrics import Metrics
from wsgateway.roster import Roster, Visitor, wall

INTERVAL: Final = 3.0
"""Seconds between two beats."""

RETRY_INTERVAL: Final = 0.2
"""Seconds until what a former life left behind is removed, while Redis is away."""

TTL: Final = 15
"""Seconds after its last beat that an instance and its connections are gone."""

BATCH: Final = 500
"""Connections written or removed in one command, about 100 KB."""

GOODBYE_SECONDS: Final = 1.0
"""How long Redis may take when the instance stops."""


class Presence:
    """One instance's part of who is online."""

    def __init__(
        self,
        pipeline: Pipeline,
        roster: Roster,
        prefix: str,
        name: str,
        epoch: str,
        metrics: Metrics,
    ) -> None:
        self._pipeline = pipeline
        self._roster = roster
        self._name = name
        self._epoch = epoch
        self._instances = f"{prefix}instances"
        self._alive = f"{prefix}alive:{name}"
        self._online = f"{prefix}online:{name}"
        self._groups = f"{prefix}groups:{name}"  # the mirror's, which is gone with us
        self._written: dict[str, float] = {}
        self._started_at = time.time()
        self._condition = Condition("presence", metrics)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Beat while inside; on leaving, be gone at once."""
        try:
            async with background.running(self._beats()):
                yield
        finally:
            goodbye = self._pipeline.submit(
                lambda: [
                    ("DEL", self._alive, self._online, self._groups),
                    ("ZREM", self._instances, self._name),
                ]
            )
            await asyncio.wait({goodbye}, timeout=GOODBYE_SECONDS)

    async def _beats(self) -> None:
        fresh = True
        while True:
            if fresh:
                self._written.clear()
                fresh = not await self._write([("DEL", self._online)])
            if fresh:
                await asyncio.sleep(RETRY_INTERVAL)
            elif not await self._beat():  # else what Redis knew is lost: write it again now
                await asyncio.sleep(INTERVAL)

    async def _beat(self) -> bool:
        """Write what changed; True if Redis has lost what was written before."""
        about = {
            "epoch": self._epoch,
            "version": __version__,
            "pid": os.getpid(),
            "started": self._started_at,
        }
        replies = await self._write(
            [
                ("SET", self._alive, orjson.dumps(about), "EX", TTL),
                ("EXPIRE", self._online, TTL),
                ("ZADD", self._instances, time.time(), self._name),
                ("ZREMRANGEBYSCORE", self._instances, 0, time.time() - TTL),
            ]
        )
        if not replies:
            return False
        if replies[1] == 0 and self._written:
            self._written.clear()
            return True
        here = {visitor.id: visitor for visitor in self._roster.find()}
        gone = [one for one in self._written if one not in here]
        await self._remove(gone)
        await self._add(here)
        return False

    async def _add(self, here: Mapping[str, Visitor]) -> None:
        changed = [
            visitor for one, visitor in here.items() if self._written.get(one) != visitor.heard_at
        ]
        for start in range(0, len(changed), BATCH):
            part = changed[start : start + BATCH]
            fields = [word for visitor in part for word in (visitor.id, _describe(visitor))]
            commands: list[Command] = [
                ("HSET", self._online, *fields),
                ("EXPIRE", self._online, TTL),
            ]
            if await self._write(commands):
                self._written |= {visitor.id: visitor.heard_at for visitor in part}

    async def _remove(self, gone: list[str]) -> None:
        for start in range(0, len(gone), BATCH):
            part = gone[start : start + BATCH]
            if await self._write([("HDEL", self._online, *part)]):
                for one in part:
                    del self._written[one]

    async def _write(self, commands: Iterable[Command]) -> list[Any]:
        """Send commands; the replies, or nothing where Redis is away or refused one."""
        listed = list(commands)
        fate, replies = await self._pipeline.submit(lambda: listed)
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            self._condition.set(state_of(refused))
        elif fate is Fate.TAKEN:
            self._condition.set(State.UP)
        return replies if fate is Fate.TAKEN and refused is None else []


def _describe(visitor: Visitor) -> bytes:
    return orjson.dumps(
        {
            "user_id": visitor.user_id,
            "device_id": visitor.device_id,
            "since": wall(visitor.opened_at),
            "last_activity": wall(visitor.heard_at),
        }
    )
