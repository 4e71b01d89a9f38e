"""One request at a time for the same thing: whoever asks meanwhile shares its answer.

Only this module owns the tasks of shared requests. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class _Flight(Generic[V]):
    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[V]) -> None:
        self.task = task
        self.waiters = 0


class Flights(Generic[V]):
    """Requests under way by key: never more than there are waiters."""

    def __init__(self) -> None:
        self._flying: dict[str, _Flight[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()

    def __contains__(self, key: str) -> bool:
        """Whether a request for it is under way."""
        return key in self._flying

    def __len__(self) -> int:
        """How many requests are under way."""
        return len(self._flying)

    async def share(self, key: str, ask: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The answer for a key, of the request under way or of a new one.

        Cancelling is safe: the request goes on for the others who wait, and is cancelled with the
        last of them. What it raises, all of them get.
        """
        flight = self._flying.get(key) or self._start(key, ask())
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self._land(key, flight)
                flight.task.cancel()  # nothing happens to one that is done

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Own the requests; on leaving every one of them is gone."""
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, key: str, asking: Coroutine[Any, Any, V]) -> _Flight[V]:
        task = asyncio.create_task(asking)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        flight = self._flying[key] = _Flight(task)
        task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: str, flight: _Flight[V]) -> None:
        if self._flying.get(key) is flight:  # a later one may have taken its place
            del self._flying[key]
