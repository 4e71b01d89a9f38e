"""The yardstick: a bare server on the same library core and loop as the gateway.

It parses each message, looks at its type and answers; no authentication, limits, close handshake,
keepalive or metrics. `python bare_server.py PORT`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import orjson
import uvloop
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

SILENT = logging.getLogger("bare")
SILENT.setLevel(logging.ERROR)
TIME = "2026-11-22T00:00:00.000000+00:00"


def text(message: dict[str, Any]) -> bytes:
    return Frame(Opcode.TEXT, orjson.dumps(message)).serialize(mask=False)


class Bare(asyncio.Protocol):
    """One connection."""

    everybody: set[Bare] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.core = ServerProtocol(logger=SILENT, max_size=65536)

    def connection_lost(self, exc: Exception | None) -> None:
        self.everybody.discard(self)

    def data_received(self, data: bytes) -> None:
        self.core.receive_data(data)
        for event in self.core.events_received():
            if isinstance(event, Request):
                self.core.send_response(self.core.accept(event))
                self.everybody.add(self)
                self.flush()
                self.transport.write(text({"type": "connection_status", "timestamp": TIME}))
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.answer(orjson.loads(event.data))
        self.flush()

    def answer(self, message: dict[str, Any]) -> None:
        if message["type"] == "ping":
            self.transport.write(text({"type": "pong", "timestamp": TIME}))
        else:
            frame = text({"type": "news", "message": message["message"], "timestamp": TIME})
            for one in self.everybody:
                one.transport.write(frame)

    def flush(self) -> None:
        for data in self.core.data_to_send():
            if data:
                self.transport.write(data)
            else:
                self.transport.close()


async def main(port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(Bare, "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
