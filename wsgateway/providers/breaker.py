"""When a service that fails is left alone.

Only this module decides that. It knows neither clocks nor loops: the time is passed in, in seconds
of a monotonic clock.
"""

from __future__ import annotations


class Breaker:
    """Lets requests pass until ``failures`` in a row failed, then none for ``pause`` seconds.

    After a pause one request tries: if it succeeds all may pass, if it fails the next pause begins.
    Every request that `wait` let pass ends with `succeeded`, `failed` or `abandoned`.
    """

    def __init__(self, failures: int, pause: float) -> None:
        self._most = failures
        self.pause = pause
        self._failed = 0
        self._until: float | None = None
        self._trying = False

    def wait(self, now: float) -> float:
        """Seconds until a request may be made; 0 lets this one pass."""
        if self._until is None:
            return 0.0
        if now < self._until:
            return self._until - now
        if self._trying:
            return self.pause  # one at a time: how the try ends is not known yet
        self._trying = True
        return 0.0

    def succeeded(self) -> bool:
        """The service works; whether that ended a pause."""
        ended = self._trying
        self._failed = 0
        if ended:
            self._until, self._trying = None, False
        return ended

    def failed(self, now: float) -> bool:
        """The service does not work; whether that began a pause."""
        self._failed += 1
        if self._trying or (self._failed >= self._most and self._until is None):
            return self.rest(now, self.pause)
        return False

    def rest(self, now: float, seconds: float) -> bool:
        """Make no requests for so many seconds; whether that began or prolonged a pause."""
        until = now + seconds
        self._trying = False
        self._failed = 0
        if self._until is not None and until <= self._until:
            return False
        self._until = until
        return True

    def abandoned(self) -> None:
        """Nobody waited for the answer: nothing is known, so that another request may try."""
        self._trying = False
