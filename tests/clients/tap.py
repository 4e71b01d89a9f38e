"""A relay on loopback that keeps every byte between devices and a gateway, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from websockets.frames import Close, Frame, Opcode
from websockets.streams import StreamReader

TapFrame = tuple[str, str]
"""A frame as its opcode's name and its text; of a close frame, its code and reason."""


@dataclass
class Passage:
    """One connection: what the device said, and what it heard."""

    said: bytearray = field(default_factory=bytearray)
    heard: bytearray = field(default_factory=bytearray)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def request(self) -> str:
        """The first line of the handshake."""
        return self.said.partition(b"\r\n")[0].decode()

    @property
    def status(self) -> int:
        """What the gateway answered to the handshake; 0 before it did."""
        return int(self.heard.split(maxsplit=2)[1]) if self.heard else 0

    def header(self, name: str) -> str | None:
        """A header of the handshake request."""
        lines = self.said.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        fields = (line.partition(": ") for line in lines)
        return next((value for key, _, value in fields if key.lower() == name), None)

    def frames_said(self) -> list[TapFrame]:
        """The device's frames, which are masked."""
        return list(_frames(self.said, mask=True))

    def frames_heard(self) -> list[TapFrame]:
        """The gateway's frames, which are not."""
        return list(_frames(self.heard, mask=False))


@dataclass
class Tap:
    """The relay, and the connections it has seen, oldest first."""

    url: str
    passages: list[Passage]

    @property
    def statuses(self) -> list[int]:
        return [passage.status for passage in self.passages]


@contextlib.asynccontextmanager
async def tapped(port: int) -> AsyncIterator[Tap]:
    """A relay to a gateway's port."""
    passages: list[Passage] = []
    relays: list[asyncio.Task[None]] = []

    def connected(device: asyncio.StreamReader, to_device: asyncio.StreamWriter) -> None:
        relays.append(asyncio.create_task(relay(device, to_device)))

    async def relay(device: asyncio.StreamReader, to_device: asyncio.StreamWriter) -> None:
        passage = Passage()
        passages.append(passage)
        gateway, to_gateway = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(
                _pass_on(device, to_gateway, passage.said.extend),
                _pass_on(gateway, to_device, passage.heard.extend),
            )
        finally:
            to_device.transport.abort()
            to_gateway.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield Tap(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", passages)
    finally:
        server.close()
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: Callable[[bytes], None]
) -> None:
    """Keep bytes, then pass them on, to the end: what a peer has seen is always kept."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            keep(data)
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


def _frames(stream: bytearray, *, mask: bool) -> Iterator[TapFrame]:
    reader = StreamReader()
    reader.feed_data(stream.partition(b"\r\n\r\n")[2])
    while True:
        try:
            next(Frame.parse(reader.read_exact, mask=mask))
        except StopIteration as parsed:
            frame: Frame = parsed.value
        else:
            return  # the rest is no whole frame
        assert frame.fin, "these clients and their gateway never fragment"
        if frame.opcode is Opcode.CLOSE:
            close = Close.parse(frame.data)
            yield "CLOSE", f"{close.code} {close.reason}".strip()
        else:
            yield frame.opcode.name, bytes(frame.data).decode()
