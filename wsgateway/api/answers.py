"""The shapes of what calls return, for the API's description; tests hold the answers to them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Delivery(msgspec.Struct, frozen=True):
    """What became of a message: connections matched and written over the instances that answered.

    ``complete`` is false where one did not answer in time or Redis was not reachable; ``users``, the
    distinct users matched, is there for broadcasts.
    """

    id: str
    matched: int
    written: int
    dropped: int
    instances: dict[str, int]
    complete: bool
    online: bool
    users: int = 0


class Sent(msgspec.Struct, frozen=True):
    """A message that was sent; ``data`` is what devices get."""

    status: Literal["success"]
    message: str
    data: dict[str, Any]
    delivery: Delivery


class Failed(msgspec.Struct, frozen=True):
    """A call, or a send of a batch, that failed; ``field`` is to blame, where there is one."""

    status: Literal["error"]
    message: str
    code: str
    field: str = ""
    http_status: int = 0


class Results(msgspec.Struct, frozen=True):
    """One result for each send of a batch, in order: what the single call would have answered."""

    results: list[dict[str, Any]]


class OnlineUser(msgspec.Struct, frozen=True):
    """A user who is connected; times are ISO 8601, UTC."""

    user_id: int
    connections: int
    instances: list[str]
    connected_at: str
    last_activity: str


class OnlineUsers(msgspec.Struct, frozen=True):
    """A page of users; ``next`` is the cursor of the following page."""

    users: list[OnlineUser]
    next: str | None
    complete: bool


class Connection(msgspec.Struct, frozen=True):
    """A device's connection; ``messages`` is how many it sent."""

    id: str
    user_id: int
    device_id: int | None
    instance: str
    address: str
    messages: int
    connected_at: str
    last_activity: str


class Connections(msgspec.Struct, frozen=True):
    """A page of connections; ``next`` is the cursor of the following page."""

    connections: list[Connection]
    next: str | None
    complete: bool


class Person(msgspec.Struct, frozen=True):
    """A user or a device and its connections, 1,000 at most."""

    online: bool
    connections: list[Connection]
    last_activity: str | None
    complete: bool
    user_id: int = 0
    device_id: int = 0


class Cut(msgspec.Struct, frozen=True):
    """How many connections were cut, and where; ``complete`` if every instance answered."""

    cut: int
    instances: dict[str, int]
    complete: bool
    active: bool = True


class Token(msgspec.Struct, frozen=True):
    """A token, without its text."""

    id: int
    user_id: int
    user_name: str
    device_id: int | None
    scope: Literal["device", "api", "admin"]
    label: str
    created_at: str
    expires_at: str | None
    state: str


class Tokens(msgspec.Struct, frozen=True):
    """A page of tokens; ``next`` is the cursor of the following page."""

    tokens: list[Token]
    next: str | None


class CreatedToken(msgspec.Struct, frozen=True):
    """A new token with its text, which is shown only now."""

    id: int
    token: str
    user_id: int
    device_id: int | None
    scope: Literal["device", "api", "admin"]
    expires_at: str | None


class QueueSize(msgspec.Struct, frozen=True):
    """Messages that wait in the queue, and bad items that were kept."""

    waiting: int
    rejected: int


class Enqueued(msgspec.Struct, frozen=True):
    """How many messages wait in the queue now."""

    waiting: int


class Cleared(msgspec.Struct, frozen=True):
    """How many messages were thrown away."""

    cleared: int


class Reloaded(msgspec.Struct, frozen=True):
    """The keys that changed: those that are in use now, and those that need a restart."""

    applied: list[str]
    restart: list[str]


class Stats(msgspec.Struct, frozen=True):
    """The gateway at one look: of this instance, and the counts of each instance.

    ``operations`` are the last 100 of each kind; ``rates`` are per second.
    """

    instance: str
    version: str
    connections: int
    users: int
    devices: int
    rates: dict[str, float]
    operations: dict[str, dict[str, Any]]
    redis: dict[str, str]
    instances: dict[str, dict[str, int]]
