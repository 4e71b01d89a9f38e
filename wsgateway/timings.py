"""How long things take: histograms for the metrics, the last 100 and the slow ones for people.

Only this module keeps durations. It knows nothing of what is measured; labels are words of this
project, so that their number is bounded.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from typing import Any, Final

log = logging.getLogger(__name__)

KEPT: Final = 100
"""Durations kept of each operation."""

SLOW_SECONDS: Final = 1.0
"""An operation that takes longer is one warning."""

BRIEF: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper bounds of buckets, in seconds, of what should be over at once."""

LONG: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
"""The same of what waits for somebody else."""

LASTING: Final = (1, 10, 60, 600, 3600, 6 * 3600, 86_400, 7 * 86_400)
"""The same of what is to last."""


class Histogram:
    """Counts of values by bucket, as plain integers, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """``bounds`` are the largest values of each bucket but the last, which takes the rest."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Durations:
    """How long one kind of operation takes, by label."""

    def __init__(self, kind: str, bounds: tuple[float, ...]) -> None:
        self.kind = kind
        self.histograms: dict[str, Histogram] = {}
        self._bounds = bounds
        self._last: dict[str, deque[float]] = {}
        self._slow: dict[str, int] = {}

    def note(self, label: str, seconds: float) -> None:
        """Keep a duration; one that is slow is a line in the log."""
        histogram = self.histograms.get(label)
        if histogram is None:
            histogram = self.histograms[label] = Histogram(self._bounds)
            self._last[label] = deque(maxlen=KEPT)
        histogram.note(seconds)
        self._last[label].append(seconds)
        if seconds > SLOW_SECONDS:
            self._slow[label] = self._slow.get(label, 0) + 1
            log.warning("slow operation %s %s took %.2f s", self.kind, label, seconds)

    def summary(self) -> dict[str, dict[str, Any]]:
        """By operation ``{"count", "mean_ms", "max_ms"}`` of the last 100, and ``"slow"`` in all."""
        return {
            f"{self.kind} {label}": {
                "count": len(last),
                "mean_ms": round(sum(last) / len(last) * 1000, 3),
                "max_ms": round(max(last) * 1000, 3),
                "slow": self._slow.get(label, 0),
            }
            for label, last in self._last.items()
        }
