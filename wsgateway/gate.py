"""Handshakes that wait because the loop is behind.

Only this module says when a handshake may go on. It knows neither sockets nor tokens. While the loop
keeps up, nobody waits. Once a tick comes late, handshakes queue, and each tick lets the oldest go on:
twice as many as the one before while ticks are in time, half as many while they are late. A refusal
costs a client one of its tries, so that only who waited too long is refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import Final, NamedTuple

from wsgateway.metrics import Metrics

FIRST_BATCH: Final = 200
"""Handshakes that go on in the first tick that came late: 2,000 a second, about half of what one
core can do."""

LEAST_BATCH: Final = 10
"""Handshakes that go on in every tick, however late it came."""

LARGEST_BATCH: Final = 3200
"""More than fit into a tick of any machine."""


class _Waiting(NamedTuple):
    since: float
    turn: asyncio.Future[bool]


class Gate:
    """Where handshakes wait, in the order they came; as many as may be unfinished at once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._waiting: deque[_Waiting] = deque()
        self._batch = FIRST_BATCH
        self.is_open = True

    async def enter(self) -> bool:
        """Wait for one's turn; False where it did not come in time. Cancelling is safe."""
        if self.is_open:
            return True
        waiting = _Waiting(monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._metrics.gate_delayed += 1
        return await waiting.turn

    def tick(self, lag: float, lag_limit: float, wait_limit: float) -> None:
        """Let some go on, as the loop's lag allows, and refuse who waited too long. All in seconds."""
        if lag > lag_limit:
            self._batch = FIRST_BATCH if self.is_open else max(LEAST_BATCH, self._batch // 2)
            self.is_open = False
        elif not self.is_open:
            self._batch = min(LARGEST_BATCH, self._batch * 2)
            self.is_open = not self._waiting
        for _ in range(min(self._batch, len(self._waiting))):
            self._end(self._waiting.popleft(), may_go_on=True)
        too_old = monotonic() - wait_limit
        while self._waiting and self._waiting[0].since < too_old:
            self._end(self._waiting.popleft(), may_go_on=False)

    def _end(self, waiting: _Waiting, *, may_go_on: bool) -> None:
        self._metrics.gate_seconds.note(monotonic() - waiting.since)
        if not waiting.turn.done():  # its connection may be gone
            waiting.turn.set_result(may_go_on)
