"""Listening sockets: opened or taken over, accepted on, and given up without a reset.

Only this module accepts connections. It knows neither what is said on them nor who may say it. The
loop's own accept is used wherever a connection's first byte is the client's: it is the faster one.
Where a PROXY header or TLS comes first, connections are accepted here and led through that within a
deadline, bounded in number, before a protocol is made for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

from wsgateway import proxy
from wsgateway.errors import StartError
from wsgateway.metrics import Metrics
from wsgateway.tls import Tls

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 64
"""Connections accepted in one turn of the loop: about 2 ms."""

FULL_SECONDS = 0.1
"""Pause after the system had no descriptor or memory for a connection."""

SHUTDOWN_SECONDS = 2.0
"""How long a peer may take to answer the end of TLS; nothing depends on its answer."""

MOST_WAITING = 65_536
"""Connections taken out of a queue at the end: more than the kernel lets wait."""

Factory = Callable[..., asyncio.Protocol]
"""Makes the protocol of a connection; ``factory(address, accepted_at)`` where a proxy told the
client's address (else it is empty) and where the connection is older than the call."""


async def listen(
    host: str,
    port: int,
    backlog: int,
    remedy: str,
    *,
    reuse_port: bool = False,
    passed: socket.socket | None = None,
) -> list[socket.socket]:
    """Listen on every address of a host, or on a socket that was passed in.

    Raises:
        StartError: ``cannot listen on <host>:<port>: <why>: <remedy>``.

    """
    if passed is not None:
        passed.setblocking(False)
        passed.listen(backlog)
        return [passed]
    bound: list[socket.socket] = []
    try:
        for family, address in await _addresses(host, port):
            bound.append(_bind(family, address, reuse_port=reuse_port))
            bound[-1].listen(backlog)
    except (OSError, UnicodeError) as error:
        for each in bound:
            each.close()
        raise StartError(f"cannot listen on {host}:{port}: {_why(error)}: {remedy}") from None
    return bound


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _bind(family: int, address: Any, *, reuse_port: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            # Without, one socket would take the port of IPv4 too, and the other could not bind.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "no such host"
    known = {
        errno.EADDRINUSE: "the port is in use",
        errno.EACCES: "not permitted (ports below 1024 need a capability)",
    }
    return known.get(error.errno or 0, error.strerror or "refused")


@dataclass(frozen=True)
class Preamble:
    """What comes before a connection's first byte counts: a PROXY header, TLS, or both.

    ``bounds`` are the seconds that all of it may take, and how many connections may be in it: the
    others wait in the kernel's queue. They are asked for at each connection, as a reload may change
    them. ``has_room`` says whether that many may be here besides those already let in.
    """

    tls: Tls | None
    proxies: proxy.Networks | None
    bounds: Callable[[], tuple[float, int]]
    has_room: Callable[[int], bool]
    metrics: Metrics


class Acceptor:
    """Accepts on listening sockets, which are its own from now on, until it is told to stop."""

    def __init__(
        self,
        listening: list[socket.socket],
        factory: Factory,
        preamble: Preamble | None = None,
        *,
        shared: bool = False,
    ) -> None:
        """``shared`` sockets stay open elsewhere: who waits is left to who accepts next."""
        self.addresses: list[tuple[str, int]] = [each.getsockname()[:2] for each in listening]
        self._listening = listening
        self._factory = factory
        self._preamble = preamble
        self._shared = shared
        self._servers: list[asyncio.Server] = []
        self._entering: set[asyncio.Task[None]] = set()
        self._paused = False

    async def start(self, backlog: int) -> None:
        """Begin to accept; ``backlog`` is that of the sockets, which the loop sets again."""
        loop = asyncio.get_running_loop()
        for each in self._listening:
            if self._preamble is None:
                server = await loop.create_server(self._factory, sock=each, backlog=backlog)
                self._servers.append(server)
            else:
                loop.add_reader(each, self._accept, each, self._preamble)

    async def stop(self) -> None:
        """Let in who waits in the kernel's queue, then close: closing alone would reset them.

        Sockets that stay open elsewhere keep their queue.

        Who is in its preamble goes on; `settled` waits for them.
        """
        # The loop closes what it accepts on.
        queues = [] if self._shared else [each.dup() for each in self._listening]
        loop = asyncio.get_running_loop()
        if isinstance(loop, asyncio.SelectorEventLoop):
            # It makes a transport a turn after it accepted, and loses who was accepted if the
            # server is closed by then; uvloop makes it at once.
            for each in self._listening:
                loop.remove_reader(each)
            await asyncio.sleep(0)
        self._close()
        for queue in queues:
            with queue, _told():
                for accepted, peer in _accepted(queue, MOST_WAITING):
                    self._admit(accepted, peer)
        if self._preamble is None:
            await self.settled()
            await asyncio.sleep(0)  # a protocol hears of its connection in the turn after

    async def settled(self) -> None:
        """Wait until nobody is in its preamble any more. Cancelling is safe."""
        while self._entering:
            await asyncio.wait(self._entering)

    async def close(self) -> None:
        """Stop at once, and cut who is in its preamble. May be called more than once."""
        self._close()
        await asyncio.sleep(0)  # a task that never began would not close its connection
        for task in self._entering:
            task.cancel()
        await self.settled()

    def _close(self) -> None:
        loop = asyncio.get_running_loop()
        for server in self._servers:
            server.close()
        for each in self._listening:
            if self._preamble is not None:
                loop.remove_reader(each)
                each.close()
        self._listening, self._servers = [], []

    def _accept(self, listening: socket.socket, preamble: Preamble) -> None:
        complete = False
        with _told():
            room = preamble.bounds()[1] - len(self._entering)
            for accepted, peer in _accepted(listening, min(room, ACCEPTS_PER_TURN)):
                self._admit(accepted, peer)
            complete = True
        if not complete:
            self._pause()
            asyncio.get_running_loop().call_later(FULL_SECONDS, self._resume)
        if len(self._entering) >= preamble.bounds()[1]:
            self._pause()

    def _pause(self) -> None:
        self._paused = True
        for each in self._listening:
            asyncio.get_running_loop().remove_reader(each)

    def _resume(self) -> None:
        preamble = self._preamble
        if self._paused and preamble is not None and len(self._entering) < preamble.bounds()[1]:
            self._paused = False
            for each in self._listening:
                asyncio.get_running_loop().add_reader(each, self._accept, each, preamble)

    def _admit(self, accepted: socket.socket, peer: str) -> None:
        preamble = self._preamble
        if preamble is not None and not preamble.has_room(len(self._entering) + 1):
            preamble.metrics.refused["descriptors"] += 1
            accepted.close()
            return
        task = asyncio.create_task(self._enter(accepted, peer))
        self._entering.add(task)
        task.add_done_callback(self._entered)

    def _entered(self, task: asyncio.Task[None]) -> None:
        self._entering.discard(task)
        self._resume()
        if not task.cancelled() and task.exception() is not None:
            log.error("accepting a connection failed", exc_info=task.exception())

    async def _enter(self, accepted: socket.socket, peer: str) -> None:
        """Lead an accepted connection to its protocol; it is closed if that fails."""
        loop, preamble, accepted_at = asyncio.get_running_loop(), self._preamble, monotonic()
        if preamble is None:
            with contextlib.suppress(OSError):  # reset while it waited
                await loop.connect_accepted_socket(self._factory, accepted)
            return
        address = await _told_address(accepted, peer, preamble) if preamble.proxies else ""
        if address is None:
            accepted.close()
            return
        deadline = accepted_at + preamble.bounds()[0]
        try:
            await loop.connect_accepted_socket(
                lambda: self._factory(address, accepted_at),
                accepted,
                **_tls_options(preamble, deadline),
            )
        except OSError as error:  # of TLS as well; the loop has closed the connection
            late = monotonic() >= deadline
            preamble.metrics.refused["handshake_timeout" if late else "tls"] += 1
            why = "took too long" if late else _tls_fault(error)
            log.warning("tls handshake failed address=%s: %s", address or peer, why)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Log that the system has no room for another connection, and go on."""
    try:
        yield
    except OSError as error:
        log.error("cannot accept connections: %s", error.strerror)


def _tls_options(preamble: Preamble, deadline: float) -> dict[str, Any]:
    if preamble.tls is None:
        return {}
    return {
        "ssl": preamble.tls.context,
        "ssl_handshake_timeout": max(0.001, deadline - monotonic()),
        "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
    }


def _tls_fault(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no TLS").lower().replace("_", " ")
    return "the client went away"


def _accepted(listening: socket.socket, most: int) -> Iterator[tuple[socket.socket, str]]:
    """What waits in the kernel's queue, with its peer's address.

    Raises:
        OSError: there is no descriptor or memory for another.

    """
    for _ in range(most):
        try:
            accepted, peer = listening.accept()
        except BlockingIOError:
            return
        except ConnectionAbortedError:
            continue
        accepted.setblocking(False)
        yield accepted, str(peer[0])


async def _told_address(accepted: socket.socket, peer: str, preamble: Preamble) -> str | None:
    """Read the PROXY header, and not a byte more: the client's address, empty if it tells none.

    None if the connection is to be closed, which is counted and logged.
    """
    assert preamble.proxies is not None
    reason = "proxy_stranger"
    if preamble.proxies.trusts(peer):
        try:
            async with asyncio.timeout(preamble.bounds()[0]):
                return (await _read_header(accepted)).address
        except TimeoutError:
            reason = "handshake_timeout"
        except (proxy.InvalidHeader, OSError):
            reason = "proxy_header"
        except asyncio.CancelledError:
            accepted.close()
            raise
    preamble.metrics.refused[reason] += 1
    log.warning("connection refused reason=%s address=%s", reason, peer)
    return None


async def _read_header(accepted: socket.socket) -> proxy.Header:
    """Consume exactly the header: the loop's TLS would not see bytes that were read with it."""
    head = b""
    while True:
        try:
            more = accepted.recv(proxy.BINARY_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(accepted)
            continue
        if not more:
            raise proxy.InvalidHeader
        header = proxy.parse(head + more)
        taken = len(more) if header is None else header.length - len(head)
        head += accepted.recv(taken)  # a part as well: what is left would be reported for ever
        if header is not None:
            return header


async def _readable(accepted: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(accepted, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(accepted)
