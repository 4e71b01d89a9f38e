"""What the calls of the HTTP API work with.

Only this module lists it; nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from wsgateway.accounts import Accounts
from wsgateway.api.idempotency import Idempotency
from wsgateway.cluster import Cluster
from wsgateway.config import Config
from wsgateway.control import Control
from wsgateway.gateway import Gateway
from wsgateway.health import Health
from wsgateway.metrics import Metrics, Rates
from wsgateway.reload import Changes
from wsgateway.sends import Sends


class Parts(Protocol):
    """What an instance has and calls use."""

    @property
    def accounts(self) -> Accounts: ...
    @property
    def health(self) -> Health: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def control(self) -> Control: ...
    @property
    def gateway(self) -> Gateway: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def sends(self) -> Sends: ...


class Queue(Protocol):
    """The queue of messages in Redis. Each raises ConnectionError where Redis is away."""

    async def size(self) -> dict[str, int]: ...
    async def enqueue(self, user_id: int, message: Any) -> int: ...
    async def clear(self) -> int: ...


@dataclass
class Api:
    """The parts of one instance that calls use."""

    sends: Sends
    control: Control
    cluster: Cluster
    accounts: Accounts
    queue: Queue | None
    metrics: Metrics
    idempotency: Idempotency
    max_message: int
    receipt_timeout: float
    is_here: Callable[[str], bool]
    """Whether a group has a member on this instance."""
    readiness: Callable[[], dict[str, Any]]
    """Whether devices can come in now, as /readyz says."""
    reload: Callable[[], Awaitable[Changes]]
    """Reads the configuration again; raises ConfigError, or Conflict while starting or stopping."""
    rates: Rates

    @classmethod
    def of(
        cls,
        config: Config,
        parts: Parts,
        queue: Queue | None,
        reload: Callable[[], Awaitable[Changes]],
    ) -> Api:
        """What calls to one instance work with."""
        hub = parts.gateway.hub
        return cls(
            sends=parts.sends,
            control=parts.control,
            cluster=parts.cluster,
            accounts=parts.accounts,
            queue=queue,
            metrics=parts.metrics,
            idempotency=Idempotency(config.api.idempotency_keys),
            max_message=config.limits.message_bytes,
            receipt_timeout=config.api.receipt_timeout,
            is_here=lambda group: bool(hub.members(group)),
            readiness=parts.health.readiness,
            reload=reload,
            rates=Rates(parts.metrics),
        )

    def configure(self, config: Config) -> None:
        """Take other bounds for the calls to come."""
        self.max_message = config.limits.message_bytes
        self.receipt_timeout = config.api.receipt_timeout
        self.idempotency.size = config.api.idempotency_keys
