"""Whether an instance should get devices: what `/readyz` says on both ports.

Only this module knows the reasons against it. It asks the parts that have them and changes nothing.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any, Final

from wsgateway.auth import Authenticator
from wsgateway.config import Config
from wsgateway.gateway import Gateway

DEAF_SECONDS: Final = 10.0
"""How long the mirror's probe may stay away before readiness tells of it."""

OPEN_DESCRIPTORS: Final = Path("/proc/self/fd")

LAG_DECAY: Final = 0.95
"""What remains of the worst lag after each tick, of which there are ten a second: it halves in 1.4 s,
so that a load balancer that looks every few seconds sees a long stall."""


class Health:
    """What speaks against this instance."""

    def __init__(self, config: Config, authenticator: Authenticator, gateway: Gateway) -> None:
        self._config = config
        self._authenticator = authenticator
        self._gateway = gateway
        self.lag = 0.0
        """The loop's worst lag lately, in seconds; each tick that is in time makes it less."""
        self.leaving = False
        """Whether this instance is about to stop."""

    def configure(self, config: Config) -> None:
        """Go by other limits."""
        self._config = config

    def note_lag(self, lag: float) -> None:
        """Note by how many seconds a tick came late."""
        self.lag = max(lag, self.lag * LAG_DECAY)

    def readiness(self) -> dict[str, Any]:
        """``{"status": "ok" | "degraded" | "unavailable", "reasons": [...]}``.

        Unavailable means that no device could come in now, or that another instance should be
        preferred; degraded, that what it sends does not reach other instances.
        """
        is_deaf = self._gateway.mirror_silence > DEAF_SECONDS
        reasons = {
            "draining": self.leaving,
            "database": not self._authenticator.usable,
            "redis": is_deaf and self._config.redis.required,
            "descriptors": self._lacks_descriptors(),
            "loop_lag": self.lag > self._config.limits.loop_lag,
        }
        unavailable = [reason for reason, holds in reasons.items() if holds]
        if unavailable:
            return {"status": "unavailable", "reasons": unavailable}
        if is_deaf:
            return {"status": "degraded", "reasons": ["redis"]}
        return {"status": "ok", "reasons": []}

    def _lacks_descriptors(self) -> bool:
        """Whether more than half of the reserve is in use."""
        used, most = descriptors()
        return used >= most - self._config.limits.descriptor_reserve // 2


def descriptors() -> tuple[int, int]:
    """Descriptors in use, and how many there may be, in no time however many there are.

    The kernel tells how many from Linux 6.2 on. Before, it is the lowest that is free, which is what
    a new one gets: all below are in use, so that it is near the most exactly where few are left.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = OPEN_DESCRIPTORS.stat().st_size if OPEN_DESCRIPTORS.exists() else 0
    if not used:
        try:
            used = os.open("/", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return most, most
        os.close(used)
    return used, most
