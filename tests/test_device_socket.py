"""The first conversation of every device, as PROTOCOL section 1 words it."""

from __future__ import annotations

import orjson
from websockets.asyncio.client import connect

from tests.conftest import Instance, ask


async def test_a_device_is_told_that_it_is_connected(gateway: Instance) -> None:
    async with connect(gateway.url()) as device:
        status = orjson.loads(await device.recv())
    assert status.pop("timestamp").endswith("+00:00")
    assert status == {
        "type": "connection_status",
        "status": "connected",
        "user_id": "1",
        "device_id": 1,
    }


async def test_a_ping_is_answered(gateway: Instance) -> None:
    async with gateway.device() as device:
        answer = await ask(device, {"type": "ping"})
    assert answer.pop("timestamp").endswith("+00:00")
    assert answer == {"type": "pong"}
