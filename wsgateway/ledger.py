"""Who sent how many, and what of it is missing: sequences, gaps and ids seen before.

Only this module says whether a message is new, and how many came before it that did not. It knows
neither Redis nor loops; the time is passed in, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Final, Generic, TypeVar

V = TypeVar("V")

MAX_SENT: Final = 100_000
"""Channels whose count a sender keeps, about 20 MB; the one not used longest starts anew."""

MAX_ORIGINS: Final = 100
"""Senders told apart per channel; the first seen is forgotten first. Anybody may invent names."""


class Sent:
    """What this instance sent: one sequence per channel."""

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self._generation = 0
        self._channels: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._used: dict[str, tuple[str, int]] = {}

    def next(self, channel: str) -> tuple[str, int]:
        """The epoch and the number of the next message on a channel."""
        known = self._channels.get(channel)
        if known is None:
            entry = (f"{self._epoch}.{self._generation}", 1)
        else:
            entry = (known[0], known[1] + 1)
            self._channels.move_to_end(channel)
        self._channels[channel] = self._used[channel] = entry
        if len(self._channels) > MAX_SENT:
            self._channels.popitem(last=False)
            # A channel that comes back must not repeat numbers: it gets another epoch.
            self._generation += 1
        return entry

    @property
    def is_used(self) -> bool:
        """Whether a channel was used that was not taken yet."""
        return bool(self._used)

    def take_used(self, limit: int) -> dict[str, tuple[str, int]]:
        """The last number of channels used since they were taken last; ``limit`` at most."""
        taken = dict(islice(self._used.items(), limit))
        for channel in taken:
            del self._used[channel]
        return taken

    def repeat(self) -> None:
        """Count every channel as used, for somebody who may have missed what was said of them."""
        self._used = dict(self._channels)


class Received:
    """What came from each sender on each channel that this instance listens to."""

    def __init__(self) -> None:
        self._channels: dict[str, OrderedDict[str, tuple[str, int]]] = {}

    def message(self, channel: str, origin: str, epoch: str, seq: int) -> int | None:
        """Note a message; how many before it are missing, or None if it is late or came before.

        The first of a sender is where counting begins; after a new epoch it begins at 1.
        """
        origins = self._origins(channel)
        known = origins.get(origin)
        if known is None:
            missing = 0
        elif known[0] == epoch:
            missing = seq - known[1] - 1
            if missing < 0:
                return None
        else:
            missing = seq - 1
        _note(origins, origin, (epoch, seq))
        return missing

    def beat(self, channel: str, origin: str, epoch: str, last: int) -> int:
        """Note the last number a sender says it used; how many up to it are missing."""
        origins = self._origins(channel)
        known = origins.get(origin)
        if known is not None and known[0] == epoch and known[1] >= last:
            return 0
        _note(origins, origin, (epoch, last))
        if known is None:
            return 0
        return last - known[1] if known[0] == epoch else last

    def forget(self, channel: str) -> None:
        """Stop counting a channel that is not listened to any more."""
        self._channels.pop(channel, None)

    def _origins(self, channel: str) -> OrderedDict[str, tuple[str, int]]:
        return self._channels.setdefault(channel, OrderedDict())


def _note(origins: OrderedDict[str, tuple[str, int]], origin: str, entry: tuple[str, int]) -> None:
    origins[origin] = entry
    if len(origins) > MAX_ORIGINS:
        origins.popitem(last=False)


class Seen(Generic[V]):
    """Ids of the last ``seconds`` with a value each, at most ``size``; the oldest is forgotten first."""

    def __init__(self, size: int, seconds: float) -> None:
        self._size = size
        self._seconds = seconds
        self._ids: OrderedDict[str, tuple[float, V]] = OrderedDict()

    def find(self, message_id: str, now: float) -> V | None:
        """What an id was noted with, if that was within the time."""
        ids = self._ids
        while ids and next(iter(ids.values()))[0] + self._seconds <= now:
            ids.popitem(last=False)
        known = ids.get(message_id)
        return None if known is None else known[1]

    def note(self, message_id: str, value: V, now: float) -> None:
        """Note an id, as the newest."""
        self._ids.pop(message_id, None)
        if len(self._ids) >= self._size:
            self._ids.popitem(last=False)
        self._ids[message_id] = (now, value)

    def __len__(self) -> int:
        return len(self._ids)
