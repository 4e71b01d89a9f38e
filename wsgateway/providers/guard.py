"""Every request to one service passes here: breaker, count and log.

Only this module says which failures make a service be left alone. It knows no service's words.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Final

from wsgateway.metrics import Metrics
from wsgateway.providers.breaker import Breaker
from wsgateway.providers.failures import Failure, Outcome

log = logging.getLogger(__name__)

SICK: Final = frozenset(
    {
        Outcome.UNREACHABLE,
        Outcome.TIMEOUT,
        Outcome.BROKEN,
        Outcome.TOO_LARGE,
        Outcome.GARBAGE,
        Outcome.UNAVAILABLE,
    }
)
"""Failures that say that the service does not work. The others are answers to one request: no
device may bring a service to be left alone for all."""

DENIED_SECONDS: Final = 300.0
"""How long a service is left alone that does not accept the key: a person has to mend that, and
services suspend who goes on asking."""


class Guard:
    """What one provider's requests pass through."""

    def __init__(
        self,
        provider: str,
        service: str,
        breaker: Breaker,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._provider = provider
        self._service = service
        self._breaker = breaker
        self._metrics = metrics
        self._clock = clock
        metrics.provider_pauses.setdefault(provider, 0)  # so that the first is seen as growth

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Make a request in the body, counted by how that ends.

        Raises:
            Failure: none is to be made now, or the one that the body raised.

        """
        wait = self._breaker.wait(self._clock())
        if wait > 0:
            raise self.counted(Failure(Outcome.PAUSED, self._service, wait=wait))
        started = self._clock()
        try:
            yield
        except Failure as failure:
            self._metrics.provider_seconds.note(self._provider, self._clock() - started)
            self.counted(failure)
            self._judge(failure)
            raise
        except BaseException:  # cancelled, or a fault of ours
            self._breaker.abandoned()
            self._count(Outcome.CANCELLED)
            raise
        self._metrics.provider_seconds.note(self._provider, self._clock() - started)
        self._count(Outcome.OK)
        self._works()

    def counted(self, failure: Failure) -> Failure:
        """Count a failure, of a request or instead of one."""
        self._count(failure.outcome)
        return failure

    def rest(self, seconds: float) -> None:
        """Leave the service alone for a while, as it asks."""
        if self._breaker.rest(self._clock(), seconds):
            self._paused("asked to wait", seconds)

    def _judge(self, failure: Failure) -> None:
        if failure.outcome is Outcome.DENIED:
            self._breaker.abandoned()
            if self._breaker.rest(self._clock(), DENIED_SECONDS):
                self._paused(failure.outcome, DENIED_SECONDS)
        elif failure.outcome in SICK:
            log.warning(
                "%s request failed outcome=%s detail=%s",
                self._provider, failure.outcome, failure.detail,
            )  # fmt: skip
            if self._breaker.failed(self._clock()):
                self._paused(failure.outcome, self._breaker.pause)
        elif failure.outcome is Outcome.LIMITED:
            self._breaker.abandoned()  # neither sick nor well
        else:
            self._works()

    def _works(self) -> None:
        if self._breaker.succeeded():
            log.info("%s works again", self._provider)

    def _paused(self, why: str, seconds: float) -> None:
        self._metrics.provider_pauses[self._provider] += 1
        log.warning("%s is left alone reason=%s seconds=%g", self._provider, why, seconds)

    def _count(self, outcome: Outcome) -> None:
        self._metrics.provider_requests[self._provider, outcome.value] += 1
