"""The verbs of the gateway: join, leave, send.

Only this module says which groups a device is in. It knows neither sockets nor SQL. Changes of the
hub are synchronous; anything read from it before an await is stale after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from wsgateway import envelope, wire
from wsgateway.envelope import Published
from wsgateway.fanout import Delivery, Fanout, Member
from wsgateway.hub import Hub
from wsgateway.metrics import Metrics

ALL = "all"
"""The group of every device."""


def user_group(user_id: int) -> str:
    return f"user_{user_id}"


def device_group(device_id: int) -> str:
    return f"device_{device_id}"


def groups_of(user_id: int, device_id: int | None) -> tuple[str, ...]:
    """The groups a connection belongs to."""
    if device_id is None:
        return (ALL, user_group(user_id))
    return (ALL, user_group(user_id), device_group(device_id))


def users_in(hub: Hub[Member]) -> list[int]:
    """The users who are connected to this instance."""
    return [int(group[5:]) for group in hub.groups() if group.startswith("user_")]


class Mirror(Protocol):
    """The way to the members of groups on other instances."""

    @property
    def is_up(self) -> bool:
        """Whether messages go through."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether it is known which other instances there are."""
        ...

    @property
    def silence(self) -> float:
        """Seconds since it was last known that they do."""
        ...

    def publish(
        self, group: str, payload: bytes, message_id: str, others: Sequence[str] = ()
    ) -> asyncio.Future[Published]:
        """Pass a message on; what became of it, and which of the others listen. Never waits."""
        ...

    def want(self, groups: Iterable[str]) -> list[asyncio.Future[None]]:
        """Begin to receive for groups; what to wait for until that is so."""
        ...

    def unwant(self, groups: Iterable[str]) -> None:
        """Stop receiving for groups."""
        ...


class Gateway:
    """One instance's view of who is connected, and the way to reach them.

    Without a ``mirror`` this instance is alone.
    """

    def __init__(
        self, hub: Hub[Member], fanout: Fanout, mirror: Mirror | None, metrics: Metrics
    ) -> None:
        self.hub = hub
        self._fanout = fanout
        self._mirror = mirror
        self._metrics = metrics
        self._arriving: Counter[str] = Counter()

    @property
    def mirror_silence(self) -> float:
        """Seconds since it was last known that messages pass between instances; 0 when alone."""
        return self._mirror.silence if self._mirror is not None else 0.0

    @contextlib.asynccontextmanager
    async def arriving(
        self, user_id: int, device_id: int | None, seconds: float
    ) -> AsyncIterator[None]:
        """While inside, messages to a connection's groups reach this instance: join before leaving.

        Waits until Redis has confirmed it, but not for longer than ``seconds``: who comes in then
        may miss what other instances send, and is counted. Cancelling is safe.
        """
        if self._mirror is None:
            yield
            return
        groups = groups_of(user_id, device_id)[1:]
        self._arriving.update(groups)
        try:
            waits = self._mirror.want(groups)
            if waits:
                late = set(waits)
                if self._mirror.is_up:
                    late = (await asyncio.wait(waits, timeout=seconds))[1]
                self._metrics.unconfirmed += bool(late)
            yield
        finally:
            self._arriving.subtract(groups)
            self._unwant(groups)

    def join(self, member: Member, user_id: int, device_id: int | None) -> None:
        """Add a connection to its groups: it gets everything that is sent from now on."""
        for group in groups_of(user_id, device_id):
            self._fanout.freeze(group)
            self.hub.join(group, member)

    def leave(self, member: Member, user_id: int, device_id: int | None) -> None:
        """Take a connection out of its groups."""
        groups = groups_of(user_id, device_id)
        for group in groups:
            self.hub.leave(group, member)
        if self._mirror is not None:
            self._unwant(groups[1:])

    def post(self, group: str, payload: bytes) -> Delivery:
        """Put a message, as JSON, on its way to every member of a group on this instance.

        When it returns, it is on its way exactly once to each of ``matched`` members; await the
        result to learn how many were ``written``.
        """
        return self._fanout.post(group, payload)

    def send(self, group: str, message: Mapping[str, Any]) -> Delivery:
        """Send a message to every member of a group, here and on the other instances.

        What is returned is of this instance, as `post` says; what the others did with it is not
        asked. Raises TypeError for a message that JSON cannot say.
        """
        payload = wire.encode(message)
        delivery = self.post(group, payload)
        if self._mirror is not None:
            self._mirror.publish(group, payload, envelope.new_id(envelope.QUIET))
        return delivery

    def to_user(self, user_id: int, message: Mapping[str, Any]) -> Delivery:
        """Send a message to all connections of a user."""
        return self.send(user_group(user_id), message)

    def to_device(self, device_id: int, message: Mapping[str, Any]) -> Delivery:
        """Send a message to all connections of a device."""
        return self.send(device_group(device_id), message)

    def to_all(self, message: Mapping[str, Any]) -> Delivery:
        """Send a message to every connection."""
        return self.send(ALL, message)

    def _unwant(self, groups: Iterable[str]) -> None:
        """Stop receiving for those of the groups that nobody is in or about to join."""
        assert self._mirror is not None
        empty = []
        for group in groups:
            if not self._arriving[group]:
                del self._arriving[group]
                if not self.hub.members(group):
                    empty.append(group)
        self._mirror.unwant(empty)
