"""Who is connected to this instance: to be looked at, and to be cut.

Only this module says what is told of a connection. It knows neither bytes nor HTTP nor Redis.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final, Protocol, cast

from wsgateway.fanout import Member
from wsgateway.gateway import ALL, device_group, user_group, users_in
from wsgateway.hub import Hub
from wsgateway.wire import CloseCode

CLOCKS_DIFFER: Final = time.time() - monotonic()
"""Seconds from the monotonic clock to the wall clock, looked at once: a time that is told twice is
told the same."""

BATCH: Final = 200
"""Connections cut at once, about 10 ms, before others get their turn."""


class Visitor(Member, Protocol):
    """A connected device."""

    address: str
    opened_at: float
    heard_at: float
    messages: int

    @property
    def id(self) -> str: ...
    @property
    def user_id(self) -> int: ...
    @property
    def device_id(self) -> int | None: ...
    @property
    def token_hash(self) -> str: ...
    def close(self, code: CloseCode, reason: str = "") -> None: ...


class Roster:
    """The connections of one instance. Times are ISO 8601, UTC."""

    def __init__(self, hub: Hub[Member], instance: str) -> None:
        self._hub = hub
        self._instance = instance

    def find(
        self,
        *,
        user_id: int | None = None,
        device_id: int | None = None,
        connection_id: str | None = None,
    ) -> list[Visitor]:
        """The connections that fit all that is given."""
        if user_id is not None:
            group = user_group(user_id)
        elif device_id is not None:
            group = device_group(device_id)
        else:
            group = ALL
        return [
            visitor
            for visitor in cast(Iterable[Visitor], self._hub.members(group))
            if (device_id is None or visitor.device_id == device_id)
            and (connection_id is None or visitor.id == connection_id)
        ]

    def page(self, visitors: Iterable[Visitor], after: str, limit: int) -> list[dict[str, Any]]:
        """The first ``limit`` of them by id, of those after an id."""
        later = (visitor for visitor in visitors if visitor.id > after)
        return [self.describe(visitor) for visitor in heapq.nsmallest(limit, later, key=_id)]

    def users(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Connected users by id: ``{"user_id", "connections", "connected_at", "last_activity"}``."""
        later = (user_id for user_id in users_in(self._hub) if user_id > after)
        return [self._describe_user(user_id) for user_id in heapq.nsmallest(limit, later)]

    def describe(self, visitor: Visitor) -> dict[str, Any]:
        """``{"id", "user_id", "device_id", "instance", "address", "messages", "connected_at",
        "last_activity"}``."""
        return {
            "id": visitor.id,
            "user_id": visitor.user_id,
            "device_id": visitor.device_id,
            "instance": self._instance,
            "address": visitor.address,
            "messages": visitor.messages,
            "connected_at": wall(visitor.opened_at),
            "last_activity": wall(_active_at(visitor)),
        }

    async def cut(self, visitors: Iterable[Visitor], code: CloseCode, reason: str) -> int:
        """Close connections, a batch at a time; how many."""
        found = list(visitors)
        for number, visitor in enumerate(found, 1):
            visitor.close(code, reason)
            if number % BATCH == 0:
                await asyncio.sleep(0)
        return len(found)

    def counts(self) -> dict[str, int]:
        """``{"connections", "users", "devices"}``; costs the same however many there are."""
        return {
            "connections": len(self._hub.members(ALL)),
            "users": self._hub.count("user"),
            "devices": self._hub.count("device"),
        }

    def _describe_user(self, user_id: int) -> dict[str, Any]:
        visitors = self.find(user_id=user_id)
        return {
            "user_id": user_id,
            "connections": len(visitors),
            "instances": [self._instance],
            "connected_at": wall(min(visitor.opened_at for visitor in visitors)),
            "last_activity": wall(max(map(_active_at, visitors))),
        }


def wall(at: float) -> str:
    """A time of the monotonic clock as the wall clock showed it."""
    return datetime.fromtimestamp(CLOCKS_DIFFER + at, UTC).isoformat()


def _active_at(visitor: Visitor) -> float:
    """When anything came from a device last; its request came before it was connected."""
    return max(visitor.heard_at, visitor.opened_at)


def _id(visitor: Visitor) -> str:
    return visitor.id
