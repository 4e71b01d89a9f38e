"""The configuration, read again while the gateway runs.

Only this module decides in which order a reload goes: read, compare, validate, apply. Until all of
it was found good, nothing is changed; what is wrong is one line and the configuration stays as it
was. It knows no part of the gateway: each takes from a configuration what concerns it.

Files are read, and whatever needs them is made, in a thread of its own: neither a slow disk nor a
file that never ends holds the loop or the exit.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Final, NamedTuple

from wsgateway import config, handlers
from wsgateway.config import Config, Loaded
from wsgateway.errors import ConfigError, Conflict, GatewayError, without_tokens
from wsgateway.metrics import Metrics

log = logging.getLogger(__name__)

READ_SECONDS: Final = 10.0
"""How long a configuration and its files may take to be read."""

Configure = Callable[[Config], object]
"""Takes another configuration; never waits and never fails."""

Apply = Callable[[], Awaitable[None]]
"""Puts in use what was prepared; brief, and never fails."""

Prepare = Callable[[Config, Config], Apply | None]
"""Makes what a part needs for another configuration, given the one in use and the other: a way to
put it in use, or None where nothing changed. It changes nothing that is in use, may read files,
and raises ConfigError. Called in a thread."""


class Changes(NamedTuple):
    """The keys that a reload found changed: those in use now, and those that need a restart."""

    applied: tuple[str, ...]
    restart: tuple[str, ...]


class _Plan(NamedTuple):
    """A configuration that was found good: the keys' changes, and what puts it in use."""

    config: Config
    changes: Changes
    applies: list[Apply]
    warnings: tuple[str, ...]


class Reloader:
    """Puts in use what the configuration says now."""

    def __init__(
        self,
        running: Config,
        read: Callable[[], Loaded],
        metrics: Metrics,
        around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        read_seconds: float = READ_SECONDS,
    ) -> None:
        """``running`` is in use; ``read`` reads again what it came from, in ``read_seconds`` at most.
        Each reload happens inside of a context of ``around``, e.g. to tell the service manager.
        """
        self._read_seconds = read_seconds
        self.running = running
        """The configuration in use."""
        self._read = read
        self._metrics = metrics
        self._around = around
        self.parts: list[Configure] = []
        """What takes another configuration, in this order."""
        self.prepares: list[Prepare] = []
        """What has to be made from it first: all of them before any part changes."""
        self._is_open = False
        self._lock = asyncio.Lock()
        self._next: asyncio.Task[Changes] | None = None
        self._tasks: set[asyncio.Task[Changes]] = set()
        self._reading: concurrent.futures.Future[_Plan] | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Let reloads happen; on leaving none is under way."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def wish(self) -> None:
        """Reload soon; the log says what became of it."""
        if self._is_open:
            self._schedule()

    async def reload(self) -> Changes:
        """Read the configuration again and put it in use.

        Reloads happen one after the other; those that are asked for while one is under way are one.
        Cancelling is safe: the reload goes on.

        Raises:
            ConfigError: it cannot be used, and nothing changed.
            Conflict: the gateway is starting or stopping.

        """
        if not self._is_open:
            raise Conflict("the gateway is starting or stopping")
        return await asyncio.shield(self._schedule())

    def _schedule(self) -> asyncio.Task[Changes]:
        if self._next is None:
            self._next = asyncio.create_task(self._take_turn())
            self._tasks.add(self._next)
            self._next.add_done_callback(self._done)
        return self._next

    def _done(self, task: asyncio.Task[Changes]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and not isinstance(task.exception(), GatewayError | None):
            log.error("reload failed", exc_info=task.exception())

    async def _take_turn(self) -> Changes:
        async with self._lock:
            self._next = None  # files are read from here on: who asks now wants them read again
            with self._around():
                try:
                    plan = await self._read_in_thread()
                except GatewayError as error:
                    self._metrics.reloads["refused"] += 1
                    log.error("reload refused, the configuration stays as it was: %s", error)
                    raise
                await self._put_in_use(plan)
                return plan.changes

    async def _read_in_thread(self) -> _Plan:
        """Not in the loop's executor: a thread there that never ends would hold the exit."""
        if self._reading is not None and not self._reading.done():
            raise ConfigError("its files are still being read for the reload before")
        reading: concurrent.futures.Future[_Plan] = concurrent.futures.Future()
        reading.set_running_or_notify_cancel()

        def work() -> None:
            try:
                reading.set_result(self._plan())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                reading.set_exception(error)

        self._reading = reading
        threading.Thread(target=work, name="reload", daemon=True).start()
        try:
            async with asyncio.timeout(self._read_seconds):
                return await asyncio.wrap_future(reading)
        except TimeoutError:
            raise ConfigError(
                f"its files could not be read within {self._read_seconds:g} s: is a disk away, or one of "
                "them a pipe?"
            ) from None

    def _plan(self) -> _Plan:
        """Read and validate everything. Raises ConfigError."""
        try:
            loaded = self._read()
            found = config.changed(self.running, loaded.config)
            live = [key for key in found if key.live]
            wanted = config.taking(self.running, loaded.config, live)
            handlers.load(loaded.config.handlers.modules)
            prepared = [prepare(self.running, wanted) for prepare in self.prepares]
        except GatewayError as error:
            raise ConfigError(without_tokens(str(error))) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ConfigError(f"{where}{error.strerror or 'cannot be read'}") from None
        restart = tuple(key.path for key in found if not key.live)
        changes = Changes(tuple(key.path for key in live), restart)
        applies = [apply for apply in prepared if apply is not None]
        return _Plan(wanted, changes, applies, loaded.warnings)

    async def _put_in_use(self, plan: _Plan) -> None:
        self.running = plan.config
        for configure in self.parts:
            configure(plan.config)
        for apply in plan.applies:
            await apply()
        self._metrics.reloads["applied"] += 1
        self._metrics.reloaded_at = time.time()
        for warning in plan.warnings:
            log.warning("%s", warning)
        log.info("reloaded applied=%s", ",".join(plan.changes.applied) or "nothing")
        if plan.changes.restart:
            log.warning("reload: needs a restart: %s", ", ".join(plan.changes.restart))
