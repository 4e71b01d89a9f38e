"""The verbs of the gateway: join, leave, send.

Only this module says which groups a device is in. It knows neither sockets nor SQL. Changes of the
hub are synchronous; anything read from it before an await is stale after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsgateway import wire
from wsgateway.fanout import Delivery, Fanout, Member
from wsgateway.hub import Hub

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


class Gateway:
    """One instance's view of who is connected, and the way to reach them."""

    def __init__(self, hub: Hub[Member], fanout: Fanout) -> None:
        self.hub = hub
        self._fanout = fanout

    def join(self, member: Member, user_id: int, device_id: int | None) -> None:
        """Add a connection to its groups: it gets everything that is sent from now on."""
        for group in groups_of(user_id, device_id):
            self._fanout.freeze(group)
            self.hub.join(group, member)

    def leave(self, member: Member, user_id: int, device_id: int | None) -> None:
        """Take a connection out of its groups."""
        for group in groups_of(user_id, device_id):
            self.hub.leave(group, member)

    def send(self, group: str, message: Mapping[str, Any]) -> Delivery:
        """Send a message to every member of a group on this instance.

        When it returns, the message is on its way exactly once to each of ``matched`` members;
        await the result to learn how many were ``written``. Raises TypeError for a message that
        JSON cannot say.
        """
        return self._fanout.post(group, wire.text_frame(wire.encode(message)))

    def to_user(self, user_id: int, message: Mapping[str, Any]) -> Delivery:
        """Send a message to all connections of a user."""
        return self.send(user_group(user_id), message)

    def to_device(self, device_id: int, message: Mapping[str, Any]) -> Delivery:
        """Send a message to all connections of a device."""
        return self.send(device_group(device_id), message)

    def to_all(self, message: Mapping[str, Any]) -> Delivery:
        """Send a message to every connection."""
        return self.send(ALL, message)
