"""A fleet of devices that come back as the gateway tells them; says what each of them saw.

`python fleet.py PORT COUNT`: device N has the token bench-N. A line on standard input ends it; then
it writes JSON: for each device ``{"here": [[from, to], ...], "got": [number, ...], "handshakes":
[seconds, ...], "refused": n, "reset": n}``, times being of the monotonic clock, which all processes
of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from time import monotonic
from typing import Any, cast

import uvloop

REQUEST = (
    "GET /ws/device/?token=bench-{number} HTTP/1.1\r\nHost: fleet\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\n\r\n"
)
GOODBYE = b"\x88\x82\0\0\0\0" + (1012).to_bytes(2, "big")
PONG = b"\x8a\x80\0\0\0\0"


class Device(asyncio.Protocol):
    """One device, over all of its connections."""

    def __init__(self, port: int, number: int) -> None:
        self._port = port
        self._request = REQUEST.format(number=number).encode()
        self._ended = False
        self.seen: dict[str, Any] = {
            "here": [], "got": [], "handshakes": [], "refused": 0, "reset": 0
        }  # fmt: skip

    async def connect(self) -> None:
        self._data, self._began, self._is_open, self._pause = b"", monotonic(), False, 0.0
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: self, "127.0.0.1", self._port
            )
        except OSError:
            self._lost()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._is_open and not self._read_answer():
            return
        while (frame := self._take_frame()) is not None:
            self._read_frame(*frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()

    def end(self) -> None:
        self._ended = True
        if self._is_open:
            self.seen["here"][-1][1] = monotonic()

    def _read_answer(self) -> bool:
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            return False
        self._data = rest
        if not head.startswith(b"HTTP/1.1 101"):
            self.seen["refused"] += 1
            self._pause = random.uniform(0.5, 1.5)
            return False
        self._is_open = True
        return True

    def _take_frame(self) -> tuple[int, bytes] | None:
        data = self._data
        if len(data) < 2:
            return None
        length, header = data[1], 2
        if length == 126:
            length, header = int.from_bytes(data[2:4], "big"), 4
        if len(data) < header + length:
            return None
        self._data = data[header + length :]
        return data[0] & 15, data[header : header + length]

    def _read_frame(self, opcode: int, payload: bytes) -> None:
        if opcode == 1:
            message = json.loads(payload)
            if message["type"] == "connection_status":
                self.seen["handshakes"].append(monotonic() - self._began)
                self.seen["here"].append([monotonic(), None])
            elif not self._ended:
                self.seen["got"].append(message["message"])
        elif opcode == 9:
            self._transport.write(PONG)
        elif opcode == 8:
            self.seen["here"][-1][1] = monotonic()
            self._is_open = False
            self._pause = json.loads(payload[2:])["retry_ms"] / 1000
            self._transport.write(GOODBYE)

    def _lost(self) -> None:
        if self._ended:
            return
        if self._is_open:
            self.seen["here"][-1][1] = monotonic()
        if not self._pause:
            self.seen["reset"] += 1
            self._pause = random.uniform(0.1, 0.5)
        loop = asyncio.get_running_loop()
        loop.call_later(self._pause, lambda: loop.create_task(self.connect()))


async def main(port: int, count: int) -> None:
    devices = [Device(port, 1 + number) for number in range(count)]
    for device in devices:
        await device.connect()
    while not all(device.seen["here"] for device in devices):
        await asyncio.sleep(0.05)
    print("here", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for device in devices:
        device.end()
    json.dump([device.seen for device in devices], sys.stdout)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
