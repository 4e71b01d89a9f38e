"""A small epoll load generator on raw sockets: what it costs must not be what is measured."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

from websockets.frames import Frame, Opcode

REQUEST = (
    "GET /ws/device/?token={token} HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\n\r\n"
)
PONG = Frame(Opcode.PONG, b"").serialize(mask=True)
IN_FLIGHT = 256
"""Handshakes under way at once."""


def frame(payload: bytes) -> bytes:
    """A masked text frame."""
    return Frame(Opcode.TEXT, payload).serialize(mask=True)


def count_frames(data: bytes) -> tuple[int, int]:
    """How many text frames and pings a read holds; frames here are short and come whole."""
    texts = pings = at = 0
    while at + 2 <= len(data):
        length, header = data[at + 1], 2
        if length == 126:
            length, header = int.from_bytes(data[at + 2 : at + 4], "big"), 4
        texts += data[at] == 0x81
        pings += data[at] == 0x89
        at += header + length
    return texts, pings


class Load:
    """Open connections to one server."""

    def __init__(self, port: int, count: int) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self._poll = select.epoll()
        self.open_seconds = self._open(port, count)

    def _open(self, port: int, count: int) -> float:
        started = time.perf_counter()
        waiting: dict[int, tuple[socket.socket, bytearray]] = {}
        number = 0
        while len(self.sockets) < count:
            while number < count and len(waiting) < IN_FLIGHT:
                number += 1
                connection = socket.create_connection(("127.0.0.1", port))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.send(REQUEST.format(token=f"bench-{number}").encode())
                connection.setblocking(False)
                waiting[connection.fileno()] = (connection, bytearray())
                self._poll.register(connection.fileno(), select.EPOLLIN)
            for descriptor, _ in self._poll.poll(10):
                if descriptor not in waiting:
                    continue
                connection, received = waiting[descriptor]
                received += connection.recv(65536)
                if not received.startswith(b"HTTP/1.1 101"):
                    raise SystemExit(f"refused: {bytes(received[:60])!r}")
                if b"connection_status" in received:
                    del waiting[descriptor]
                    self.sockets[descriptor] = connection
        return time.perf_counter() - started

    def round_trips(self, payload: bytes, window: int, seconds: float) -> int:
        """Keep ``window`` requests in flight on each connection; answers in so many seconds."""
        request = frame(payload)
        for connection in self.sockets.values():
            connection.send(request * window)

        def answer(connection: socket.socket, texts: int) -> None:
            connection.send(request * texts)

        return self._run(seconds, answer)

    def deliveries(self, payload: bytes, in_flight: int, seconds: float) -> int:
        """Keep ``in_flight`` publications under way, sent by one device, received by all."""
        publication = frame(payload)
        publisher = next(iter(self.sockets.values()))
        publisher.send(publication * in_flight)
        received = 0

        def publish(_: socket.socket, texts: int) -> None:
            nonlocal received
            received += texts
            complete, received = divmod(received, len(self.sockets))
            if complete:
                publisher.send(publication * complete)

        return self._run(seconds, publish)

    def hold(self, seconds: float) -> None:
        """Do nothing but answer pings."""
        self._run(seconds, lambda *_: None)

    def _run(self, seconds: float, on_texts: Callable[[socket.socket, int], None]) -> int:
        total, end = 0, time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            for descriptor, _ in self._poll.poll(min(left, 0.2)):
                connection = self.sockets[descriptor]
                texts, pings = count_frames(connection.recv(262_144))
                total += texts
                if pings:
                    connection.send(PONG)
                if texts:
                    on_texts(connection, texts)
        return total

    def close(self) -> None:
        for connection in self.sockets.values():
            connection.close()
        self._poll.close()
