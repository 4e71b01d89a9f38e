"""What signals mean to a gateway that serves.

Only this module knows signals. SIGTERM and SIGINT stop it, a second one at once; SIGHUP reloads;
SIGUSR1 dumps. Until the gateway is ready, the last two wait and end nothing.

SIGHUP also says that the terminal is gone. A gateway that was started on one stops then, as every
program does that somebody runs by hand.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable


class Signals:
    """The signals of this process, from the moment on that this is made."""

    def __init__(self) -> None:
        self._on_terminal = _is_on_terminal()
        self._waiting: set[int] = set()
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._waiting.add(number))

    def stop_with(self, stop: Callable[[], None]) -> None:
        """From now on let signals stop the gateway that is starting in the running loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        self._stop = stop

    def answer_with(self, reload: Callable[[], None], dump: Callable[[], None]) -> None:
        """The gateway is ready: answer the other signals too, and those that came before."""
        loop = asyncio.get_running_loop()

        def on_hangup() -> None:
            if self._on_terminal and not _is_on_terminal():
                self._stop()
            else:
                reload()

        for number, answer in ((signal.SIGHUP, on_hangup), (signal.SIGUSR1, dump)):
            loop.add_signal_handler(number, answer)
            if number in self._waiting:
                answer()


def _is_on_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
