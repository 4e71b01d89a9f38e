"""How a fleet is sent away so that all of it comes back, and not all at once.

Only this module paces the goodbyes and says when each device is to return. It knows connections only
as something that is busy or not and can be closed.
"""

from __future__ import annotations

import asyncio
import math
import random
from time import monotonic
from typing import Final

from wsgateway.config import Drain
from wsgateway.connection import Connection, Phase
from wsgateway.wire import CloseCode

PAUSE: Final = 0.1
"""Seconds between two batches."""

LEAST_BATCH: Final = 200
"""Connections closed at once, about 10 ms, before others get their turn."""

LEAST_RETURN_MS: Final = 1000
"""Over how many milliseconds even a small fleet comes back: its new instance has to start."""


async def send_away(waiting: list[Connection], settings: Drain) -> None:
    """Tell every device to come back, idle ones first, spread over the first part of the window.

    A device that waits for an answer is told once it has it, or after ``grace``. All are to come back
    within the time that an instance needs to take them. Returns when the last was told, within the
    window. Cancelling is safe.
    """
    now = monotonic()
    end, patient_until = now + settings.window, now + min(settings.grace, settings.window / 2)
    return_ms = max(LEAST_RETURN_MS, round(len(waiting) / settings.return_rate * 1000))
    pauses = max(1, int(settings.window * 0.5 / PAUSE))
    batch = max(LEAST_BATCH, math.ceil(len(waiting) / pauses))
    while waiting:
        is_late, patient = monotonic() >= end, monotonic() < patient_until
        due = [each for each in waiting if not (patient and each.busy)]
        due = due if is_late else due[:batch]
        told = set(due)
        waiting = [each for each in waiting if each not in told]
        for connection in due:
            retry_ms = random.randint(0, return_ms)  # noqa: S311 - spreads returns
            if connection.phase is Phase.OPEN:
                connection.close(CloseCode.RESTART, f'{{"retry_ms":{retry_ms}}}')
        if waiting:
            await asyncio.sleep(PAUSE)
