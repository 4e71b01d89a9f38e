"""Sends that a caller repeats because he does not know whether the first one worked.

Only this module remembers keys. The same key gives the same answer, and while the first send is
under way, the repetition waits for it; a send that failed may be tried again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, Final, NamedTuple

from wsgateway.errors import Conflict
from wsgateway.sends import CONFLICT

SECONDS: Final = 300.0
"""How long a key is remembered."""


class _Entry(NamedTuple):
    fingerprint: str
    answer: asyncio.Future[Any]
    at: float


class Idempotency:
    """The keys of the last 5 minutes, at most ``size``; the oldest is forgotten first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def once(self, key: str, fingerprint: str, send: Callable[[], Awaitable[Any]]) -> Any:
        """What ``send`` returned for this key, which is called only if it was not before.

        Raises:
            Conflict: the key was used with another body; else what ``send`` raises.

        """
        now = monotonic()
        self._expire(now)
        known = self._entries.get(key)
        if known is not None:
            if known.fingerprint != fingerprint:
                raise Conflict(CONFLICT)
            return await asyncio.shield(known.answer)
        answer = asyncio.ensure_future(send())
        self._entries[key] = _Entry(fingerprint, answer, now)
        answer.add_done_callback(lambda done: self._settle(key, done))
        # Shielded: the caller may hang up, and ask again with the same key.
        return await asyncio.shield(answer)

    def _settle(self, key: str, answer: asyncio.Future[Any]) -> None:
        """Forget a send that failed: it may be tried again."""
        if answer.cancelled() or answer.exception() is not None:
            known = self._entries.get(key)
            if known is not None and known.answer is answer:
                del self._entries[key]

    def _expire(self, now: float) -> None:
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.at + SECONDS > now and len(self._entries) < self.size:
                return
            del self._entries[key]
