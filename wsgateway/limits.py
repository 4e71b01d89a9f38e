"""How much a device may send: sliding windows, and who inherits them.

Only this module says whether one more message fits. It knows neither sockets nor the clock: the
time is passed in, in seconds of a monotonic clock, so that clock jumps change nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable

MAX_RUNS = 128
"""Runs that a window remembers at most, whatever its limit. A window of up to that many messages is
exact; a larger one merges messages that are close in time and errs by window / 128 against the
sender, so that what it costs and holds does not depend on the limit."""


class Window:
    """At most ``limit`` messages in any ``seconds``.

    Remembers runs of messages as [first, last, count]; a run leaves the window with its last
    message, so that never more than ``limit`` fit into any window.
    """

    __slots__ = ("_grain", "_limit", "_runs", "_seconds", "_total")

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._grain = seconds / MAX_RUNS if limit > MAX_RUNS else 0.0
        self._runs: deque[list[float]] | None = None  # idle connections hold none
        self._total = 0

    def admit(self, now: float) -> bool:
        """Count a message at ``now``; False if it is one too many (then it is not counted)."""
        runs = self._runs
        if runs is None:
            runs = self._runs = deque()
        start = now - self._seconds
        while runs and runs[0][1] <= start:
            self._total -= int(runs.popleft()[2])
        if self._total >= self._limit:
            return False
        self._total += 1
        if runs and now - runs[-1][0] < self._grain:
            run = runs[-1]
            run[1] = now
            run[2] += 1
        else:
            runs.append([now, now, 1])
        return True

    def wait(self, now: float) -> float:
        """Seconds until one more message fits; 0 if it fits now."""
        if self._total < self._limit or not self._runs:
            return 0.0
        excess = self._total - self._limit + 1
        for _, last, count in self._runs:
            excess -= int(count)
            if excess <= 0:
                return max(0.0, last + self._seconds - now)
        return 0.0

    def used(self, now: float) -> int:
        """Messages counted in the window that ends now."""
        start = now - self._seconds
        return sum(int(count) for _, last, count in self._runs or () if last > start)

    def copy(self) -> Window:
        """A window of its own with the same memory."""
        twin = Window(self._limit, self._seconds)
        twin._runs = deque([list(run) for run in self._runs]) if self._runs else None
        twin._total = self._total
        return twin


class Departed:
    """The windows of devices that left, for those that come back within one.

    Holds at most ``size`` windows; the longest gone is forgotten first and counted.
    """

    def __init__(self, limit: int, seconds: float, size: int) -> None:
        self._limit = limit
        self._seconds = seconds
        self._size = size
        self._windows: OrderedDict[Hashable, tuple[float, Window]] = OrderedDict()
        self.forgotten = 0

    def configure(self, limit: int, seconds: float, size: int) -> bool:
        """Take other limits; whether windows changed, so that those who left get new ones as well.

        A window cannot be judged by a rule that its messages were not sent under.
        """
        fresh = (limit, seconds) != (self._limit, self._seconds)
        self._limit, self._seconds, self._size = limit, seconds, size
        if fresh:
            self._windows.clear()
        self._trim()
        return fresh

    def new(self) -> Window:
        """The window of a device that has sent nothing yet."""
        return Window(self._limit, self._seconds)

    def leave(self, owner: Hashable, window: Window, now: float) -> None:
        """Remember the window of a device that goes, unless a fuller one is remembered."""
        self._expire(now)
        used = window.used(now)
        if used == 0:
            return
        known = self._windows.get(owner)
        if known is not None and known[1].used(now) > used:
            return
        self._windows[owner] = (now, window)
        self._windows.move_to_end(owner)
        self._trim()

    def inherit(self, owner: Hashable, now: float) -> Window:
        """The window of a device that comes: a copy of what it left within one window, or new."""
        self._expire(now)
        known = self._windows.get(owner)
        return known[1].copy() if known else self.new()

    def _trim(self) -> None:
        while len(self._windows) > self._size:
            self._windows.popitem(last=False)
            self.forgotten += 1

    def _expire(self, now: float) -> None:
        while self._windows:
            owner, (left, _) = next(iter(self._windows.items()))
            if left + self._seconds > now:
                return
            del self._windows[owner]

    def __len__(self) -> int:
        """How many windows are remembered."""
        return len(self._windows)
