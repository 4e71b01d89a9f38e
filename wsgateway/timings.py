"""How long operations take: the last 100 of each, and those that were slow.

Only this module keeps durations. It knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Any, Final

log = logging.getLogger(__name__)

KEPT: Final = 100
"""Durations kept of each operation."""

SLOW_SECONDS: Final = 1.0
"""An operation that takes longer is one warning."""


class Timings:
    """Durations by operation; the names are words of this project, so their number is bounded."""

    def __init__(self) -> None:
        self._last: dict[str, deque[float]] = {}
        self._slow: dict[str, int] = {}
        self._failed: dict[str, int] = {}

    @contextlib.contextmanager
    def measure(self, operation: str) -> Iterator[None]:
        """Measure the body; a failure counts, and its duration too."""
        started = perf_counter()
        try:
            yield
        except Exception:
            self._failed[operation] = self._failed.get(operation, 0) + 1
            raise
        finally:
            self.note(operation, perf_counter() - started)

    def note(self, operation: str, seconds: float) -> None:
        """Keep a duration."""
        last = self._last.get(operation)
        if last is None:
            last = self._last[operation] = deque(maxlen=KEPT)
        last.append(seconds)
        if seconds > SLOW_SECONDS:
            self._slow[operation] = self._slow.get(operation, 0) + 1
            log.warning("slow operation %s took %.2f s", operation, seconds)

    def summary(self) -> dict[str, dict[str, Any]]:
        """By operation ``{"count", "mean_ms", "max_ms", "slow", "failed"}``, the first three of the
        last 100."""
        return {
            operation: {
                "count": len(last),
                "mean_ms": round(sum(last) / len(last) * 1000, 3),
                "max_ms": round(max(last) * 1000, 3),
                "slow": self._slow.get(operation, 0),
                "failed": self._failed.get(operation, 0),
            }
            for operation, last in self._last.items()
        }
