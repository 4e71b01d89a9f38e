"""The process as a service of systemd: what it tells, the watchdog it feeds, the sockets it is given.

Only this module knows the variables and datagrams of sd_notify(3), sd_watchdog_enabled(3) and
sd_listen_fds(3). It knows nothing of what is served. Where systemd did not start the process,
nothing is told to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Final

from wsgateway.errors import ConfigError

log = logging.getLogger(__name__)

REPORT_SECONDS: Final = 5.0
"""Seconds between two reports for `systemctl status`; shorter where the watchdog wants it so."""

SHORTEST_PAUSE: Final = 0.1
"""Seconds between two reports at least, however short the watchdog's period is."""

FIRST_DESCRIPTOR: Final = 3
"""The number of the first socket that is passed, by sd_listen_fds(3)."""

SOCKET_NAMES: Final = ("ws", "http")
"""FileDescriptorName= of what may be passed: the device socket and the HTTP API."""

VARIABLES: Final = (
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES",
)  # fmt: skip


class Service:
    """This process as systemd sees it.

    ``sockets`` are the listening sockets that were passed, by name. Nothing here waits or fails
    once it is made: a systemd that does not listen is one line in the log.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Read the variables and remove them: whatever is started from here is not this service.

        Raises:
            ConfigError: a variable or a socket cannot be what systemd means.

        """
        given = {name: environ.pop(name) for name in VARIABLES if environ.get(name)}
        self.sockets = _passed_sockets(given)
        self._address = given.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # the abstract namespace, by unix(7)
            self._address = "\0" + self._address[1:]
        period = _watchdog_seconds(given)
        self._feeds = period > 0
        pause = period / 3 if self._feeds else REPORT_SECONDS
        self._pause = max(SHORTEST_PAUSE, min(REPORT_SECONDS, pause))
        self._phase = "starting"
        self._changed = asyncio.Event()
        self._unheard = ""
        self._is_heard = True

    def notify_ready(self) -> None:
        """Say that the service serves."""
        self._enter("serving", "READY=1\n")

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that a reload is under way, and when it is over, whatever became of it.

        The time makes it fit for Type=notify-reload, which systemd has from 253 on.
        """
        now = time.monotonic_ns() // 1000
        self._enter("reloading", f"RELOADING=1\nMONOTONIC_USEC={now}\n")
        try:
            yield
        finally:
            self.notify_ready()

    def notify_stopping(self, seconds: float) -> None:
        """Say that the service leaves its clients, and how long that may take.

        A stop that is configured to take longer than TimeoutStopSec= is then not cut short.
        """
        self._enter("draining", f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}\n")

    async def report(self, describe: Callable[[], str], is_alive: Callable[[], bool]) -> None:
        """Say how things are every few seconds, for ever; cancelling is safe.

        ``describe`` is what `systemctl status` shows. The watchdog is fed at a third of its period,
        from the loop and so only while that turns, and only while ``is_alive`` says so.
        """
        was_alive = True
        while self._address:
            alive = is_alive()
            if self._feeds and was_alive and not alive:
                log.error("a task is stuck: the watchdog is not fed, and systemd will restart this")
            was_alive = alive
            feed = "WATCHDOG=1\n" if self._feeds and alive else ""
            self._tell(f"STATUS={self._phase}: {describe()}\n{feed}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause):
                    await self._changed.wait()
            self._changed.clear()

    def _enter(self, phase: str, words: str) -> None:
        self._phase = phase
        self._unheard = words
        self._tell("")
        self._changed.set()

    def _tell(self, words: str) -> None:
        """Send a datagram, with the last change before it if that was not taken yet."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)  # a full queue of systemd's must not hold the loop
                sender.sendto((self._unheard + words).encode(), self._address)
        except OSError as error:
            if self._is_heard:
                log.warning("systemd does not hear this service: %s", error.strerror or error)
            self._is_heard = False
            return
        if not self._is_heard:
            log.info("systemd hears this service again")
        self._is_heard, self._unheard = True, ""


def _watchdog_seconds(given: Mapping[str, str]) -> float:
    """The period in which the watchdog is to be fed; 0 without one, or where it is not for us."""
    if "WATCHDOG_USEC" not in given:
        return 0.0
    microseconds = _number(given, "WATCHDOG_USEC")
    is_ours = "WATCHDOG_PID" not in given or _number(given, "WATCHDOG_PID") == os.getpid()
    return microseconds / 1e6 if is_ours else 0.0


def _passed_sockets(given: Mapping[str, str]) -> dict[str, socket.socket]:
    if "LISTEN_PID" not in given or "LISTEN_FDS" not in given:
        return {}
    if _number(given, "LISTEN_PID") != os.getpid():
        return {}  # they were for the process that started this one
    count = _number(given, "LISTEN_FDS")
    if count > len(SOCKET_NAMES):
        raise ConfigError(f"$LISTEN_FDS = {count}: at most two sockets are used, ws and http")
    names = given.get("LISTEN_FDNAMES", ":".join(["unknown"] * count)).split(":")
    if len(names) != count:
        raise ConfigError(f"$LISTEN_FDNAMES names {len(names)} sockets, $LISTEN_FDS says {count}")
    # Without FileDescriptorName= a socket is named after its unit.
    if count == 1 and (names[0] in ("", "unknown") or names[0].endswith(".socket")):
        names = ["ws"]
    sockets: dict[str, socket.socket] = {}
    for descriptor, name in enumerate(names, FIRST_DESCRIPTOR):
        if name not in SOCKET_NAMES:
            raise ConfigError(f"the passed socket {name!r}: FileDescriptorName= must be ws or http")
        if name in sockets:
            raise ConfigError(f"two passed sockets are named {name}: one ListenStream= for each")
        sockets[name] = _listening(descriptor, name)
    return sockets


def _listening(descriptor: int, name: str) -> socket.socket:
    """A passed descriptor as a socket that is not inherited further. Raises ConfigError."""
    try:
        passed = socket.socket(fileno=descriptor)
        passed.set_inheritable(False)
        passed.setblocking(False)
        is_listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"the passed socket {name!r}: {error.strerror}") from None
    if not is_listening or passed.family not in (socket.AF_INET, socket.AF_INET6):
        raise ConfigError(
            f"the passed socket {name!r} does not listen on TCP: "
            "ListenStream= takes a port, and Accept= is to be no"
        )
    return passed


def _number(given: Mapping[str, str], name: str) -> int:
    text = given[name]
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
        raise ConfigError(f"${name} = {text!r}: must be a whole number above 0")
    return int(text)
