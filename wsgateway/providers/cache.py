"""Answers that may be given again for a while.

Only this module knows how long and how many. It knows neither clocks nor what it keeps: the time is
passed in, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class Cache(Generic[V]):
    """At most ``size`` answers, each for ``seconds``; the oldest is forgotten first."""

    def __init__(self, size: int, seconds: float) -> None:
        self._size = size
        self._seconds = seconds
        self._answers: OrderedDict[str, tuple[float, V]] = OrderedDict()  # oldest first

    def get(self, key: str, now: float) -> V | None:
        """The answer, unless it is too old or was never there."""
        self._expire(now)
        known = self._answers.get(key)
        return known[1] if known else None

    def put(self, key: str, answer: V, now: float) -> None:
        """Keep an answer from now on."""
        if self._seconds <= 0:
            return
        self._answers[key] = (now, answer)
        self._answers.move_to_end(key)
        if len(self._answers) > self._size:
            self._answers.popitem(last=False)

    def _expire(self, now: float) -> None:
        while self._answers:
            key, (since, _) = next(iter(self._answers.items()))
            if since + self._seconds > now:
                return
            del self._answers[key]

    def __len__(self) -> int:
        """How many answers are kept."""
        return len(self._answers)
