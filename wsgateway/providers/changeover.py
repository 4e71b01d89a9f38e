"""Services that take each other's place while requests to them run.

Only this module knows how long services that were replaced go on. It knows no service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

log = logging.getLogger(__name__)

MAX_RETIRED: Final = 4
"""Services replaced that still run; beyond, the oldest ends at once, and with it its requests."""

Part = Callable[[], AbstractAsyncContextManager[None]]


class Changeover:
    """Runs the services in use, and for a while those that they replaced."""

    def __init__(self) -> None:
        self._tasks: deque[asyncio.Task[None]] = deque()  # oldest first; the last is in use

    @contextlib.asynccontextmanager
    async def running(self, first: Part) -> AsyncIterator[None]:
        """Run services, and those that take their place; on leaving none is running."""
        try:
            await self.change(first, 0)
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def change(self, services: Part, seconds: float) -> None:
        """Start services; those in use until now end after so many seconds, on which nobody waits.

        When it returns, the new ones can be asked. Raises what keeps them from starting.
        """
        started = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(_run(services, started))
        task.add_done_callback(self._ended)
        self._tasks.append(task)
        await started
        if len(self._tasks) > 1:
            asyncio.get_running_loop().call_later(seconds, self._tasks[-2].cancel)
        if len(self._tasks) > MAX_RETIRED + 1:
            self._tasks[0].cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)


async def _run(services: Part, started: asyncio.Future[None]) -> None:
    """Entered and left in one task, as what it runs may ask for."""
    try:
        async with services():
            started.set_result(None)
            await asyncio.Event().wait()  # until cancelled
    except Exception as error:
        if started.done():
            log.exception("outside services failed to end")
        else:
            started.set_exception(error)
