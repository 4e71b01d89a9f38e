"""What an instance needs Redis for, built and run together.

Only this module knows that mirror, presence and queue share connections. It is imported only where
Redis is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from time import monotonic
from typing import Final, Protocol

from wsgateway import background
from wsgateway.accounts import Accounts
from wsgateway.cluster import Cluster
from wsgateway.config import Config
from wsgateway.ingest import Ingest
from wsgateway.link import Pipeline, Redis
from wsgateway.metrics import Metrics
from wsgateway.mirror import SETTLE_SECONDS, Mirror
from wsgateway.presence import Presence
from wsgateway.roster import Roster
from wsgateway.sends import Sends

STUCK_SECONDS: Final = 30.0
"""How long the mirror may stand still, besides Redis's time-outs, before its task counts as stuck:
three times what it waits at most, for Redis that is away (4 s) or deaf (5 s)."""


class Parts(Protocol):
    """What of an instance hears from Redis."""

    @property
    def accounts(self) -> Accounts: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def roster(self) -> Roster: ...
    @property
    def sends(self) -> Sends: ...


class Federation:
    """An instance's connections to Redis and what runs over them."""

    def __init__(self, config: Config, epoch: str, metrics: Metrics) -> None:
        """Connect to nothing yet. Raises ConfigError for a URL that cannot be read."""
        self._config = config
        self._name = name = config.server.instance
        self._epoch = epoch
        self._metrics = metrics
        self._ingest: Ingest | None = None
        self._redis = Redis(config.redis, name, metrics)
        self._pipeline = Pipeline(self._redis, "publisher", config.redis.publish_bytes)
        self.mirror = Mirror(
            self._redis,
            self._pipeline,
            name,
            epoch,
            config.redis.prefix,
            config.limits.message_bytes,
            metrics,
        )

    @property
    def is_turning(self) -> bool:
        """Whether the mirror's task goes on, with or without Redis."""
        patience = STUCK_SECONDS + 3 * self._config.redis.timeout
        return monotonic() - self.mirror.turned_at < patience

    @property
    def state(self) -> str:
        """'up', or what keeps the mirror from it: a `link.State`."""
        states = (self._metrics.redis_states[role] for role in ("publisher", "subscriber"))
        return next((state for state in states if state != "up"), "up")

    def configure(self, config: Config) -> None:
        """Take other bounds for what comes through Redis."""
        self._config = config
        self.mirror.max_message = config.limits.message_bytes
        if self._ingest is not None:
            self._ingest.configure(config)

    @contextlib.asynccontextmanager
    async def running(self, parts: Parts) -> AsyncIterator[Ingest | None]:
        """Run everything, and wait a moment for the mirror to work; the queue, if it is enabled.

        Redis may be away, now and later: nothing here ends because of it.
        """
        cluster, sends, roster = parts.cluster, parts.sends, parts.roster
        prefix = self._config.redis.prefix
        presence = Presence(self._pipeline, roster, prefix, self._name, self._epoch, self._metrics)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(
                background.running(
                    self._pipeline.run(),
                    self.mirror.run(
                        sends.deliver, cluster.heard_word, cluster.heard_beat, cluster.hears_again
                    ),
                )
            )
            await stack.enter_async_context(presence.running())
            await stack.enter_async_context(cluster.running())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.redis.timeout):
                    await self.mirror.first_up.wait()
                    await asyncio.sleep(SETTLE_SECONDS)  # the others were asked to say hello
            if self._config.queue.enabled:
                popper = Pipeline(self._redis, "queue", self._config.redis.publish_bytes)
                self._ingest = ingest = Ingest(
                    self._config.queue,
                    self._pipeline,
                    popper,
                    sends,
                    parts.accounts.exists,
                    prefix,
                    self._name,
                    self._epoch,
                    self._config.limits.message_bytes,
                    self._metrics,
                )
                await stack.enter_async_context(background.running(popper.run(), ingest.run()))
                stack.push_async_callback(ingest.stop)
            yield self._ingest
