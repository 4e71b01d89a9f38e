"""Which channels this instance wants to hear, and which it hears.

Only this module keeps the difference between the two, which one task makes true. It knows neither
Redis nor groups; the time is passed in, in seconds of a monotonic clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

Confirmation = asyncio.Future[None]
"""Done once a channel is heard; shared, so wait for it with `asyncio.wait`, which cancels nothing."""


class Subscriptions:
    """Channels that are wanted for ever (``fixed``), or for as long as somebody wants them."""

    def __init__(self, fixed: Iterable[str]) -> None:
        self._fixed = dict.fromkeys(fixed)
        self._wanted = set(self._fixed)
        self._lingering: dict[str, float] = {}  # with since when nobody wants them
        self._unasked: dict[str, None] = {}
        self._heard: set[str] = set()
        self._waiting: dict[str, Confirmation] = {}
        self.changed = asyncio.Event()
        """Set when there is something to ask for."""

    @property
    def wanted(self) -> list[str]:
        """All channels that are wanted or were lately."""
        return list(self._wanted)

    def hears(self, channel: str) -> bool:
        """Whether a channel was confirmed on this connection."""
        return channel in self._heard

    def want(self, channels: Iterable[str]) -> list[Confirmation]:
        """Ask for channels soon; what to wait for until each is heard."""
        waits = []
        for channel in channels:
            self._lingering.pop(channel, None)
            if channel not in self._wanted:
                self._wanted.add(channel)
                self._unasked[channel] = None
                self.changed.set()
            if channel not in self._heard:
                if channel not in self._waiting:
                    self._waiting[channel] = asyncio.get_running_loop().create_future()
                waits.append(self._waiting[channel])
        return waits

    def unwant(self, channels: Iterable[str], now: float) -> None:
        """Nobody wants channels any more; they linger for whoever comes back."""
        for channel in channels:
            if channel in self._wanted:
                self._lingering[channel] = now

    def reconnected(self) -> None:
        """Nothing is heard any more: ask for all again, the fixed ones last.

        When those are heard, all others are heard as well.
        """
        self._heard.clear()
        self._unasked = dict.fromkeys([*(self._wanted - self._fixed.keys()), *self._fixed])
        self.changed.set()

    def disconnected(self) -> None:
        """Nothing is heard any more."""
        self._heard.clear()

    def take_unasked(self, limit: int) -> list[str]:
        """Channels to ask for now, ``limit`` at most."""
        taken = [channel for channel, _ in zip(self._unasked, range(limit), strict=False)]
        for channel in taken:
            del self._unasked[channel]
        return taken

    def confirm(self, channel: str) -> None:
        """A channel is heard."""
        if channel in self._wanted:
            self._heard.add(channel)
            self._answer(channel)

    def take_over(self, before: float) -> list[str]:
        """Channels that nobody wanted since a time: they are wanted no longer."""
        over = [channel for channel, since in self._lingering.items() if since < before]
        for channel in over:
            del self._lingering[channel]
            self._wanted.discard(channel)
            self._heard.discard(channel)
            self._unasked.pop(channel, None)
            self._answer(channel)
        return over

    def _answer(self, channel: str) -> None:
        waiting = self._waiting.pop(channel, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
