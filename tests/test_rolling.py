"""Two instances on one port are restarted one after the other, and the fleet hardly notices."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession

from tests.conftest import Accounts, Process, RedisServer
from wsgateway import auth, store

pytestmark = [pytest.mark.load, pytest.mark.timeout(300)]

FLEET = Path(__file__).parent / "clients" / "fleet.py"
COUNT = 2000
PAUSE = 0.1
"""Seconds between two messages to everybody."""


@pytest.fixture
async def crowd(accounts: Accounts) -> Accounts:
    async with store.open_to_write(accounts.path) as db:
        for number in range(1, COUNT + 1):
            user = await db.add_user(f"user-{number}")
            await db.add_token(auth.hash_token(f"bench-{number}"), user, "device")
    return accounts


class Backend:
    """Sends a number to everybody again and again, through whichever instance is there."""

    def __init__(self, key: str) -> None:
        self.gateways: list[Process] = []
        self.sent: dict[int, tuple[float, float]] = {}
        """When each call was begun and answered."""
        self._key = key

    async def run(self) -> None:
        async with ClientSession(headers={"X-API-Key": self._key}) as session:
            number = 0
            while True:
                number += 1
                began = monotonic()  # a try that failed may have sent it all the same
                for gateway in self.gateways:
                    if await self._send(session, gateway, number, began):
                        break
                await asyncio.sleep(PAUSE)

    async def _send(
        self, session: ClientSession, gateway: Process, number: int, began: float
    ) -> bool:
        url = f"http://127.0.0.1:{gateway.api_port}/api/broadcast"
        headers = {"Idempotency-Key": f"{number}"}
        try:
            async with session.post(url, json={"message": number}, headers=headers) as answer:
                # What is not complete claims nothing of the other instance.
                done = answer.status == 200 and (await answer.json())["delivery"]["complete"]
        except ClientError:
            return False
        if done:
            self.sent[number] = (began, monotonic())
        return bool(done)


async def test_a_rolling_restart_of_two_instances_costs_each_device_a_moment(
    crowd: Accounts, redis_server: RedisServer, serve: Callable[..., Process]
) -> None:
    key = await crowd.add_token(scope="admin")
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as free:
        port = free.getsockname()[1]

    def start(name: str) -> Process:
        return serve(
            "--host", "127.0.0.1", "--port", str(port), "--set", "server.reuse_port=true",
            "--set", f"server.instance={name}", "--set", f"redis.url={redis_server.url}",
            "--set", f"auth.database={crowd.path}", "--set", "drain.window=6s",
        )  # fmt: skip

    backend = Backend(key)
    backend.gateways = [await asyncio.to_thread(start, name) for name in "ab"]
    with subprocess.Popen(
        [sys.executable, str(FLEET), str(port), str(COUNT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as fleet:  # fmt: skip
        assert fleet.stdout is not None
        assert await asyncio.to_thread(fleet.stdout.readline) == "here\n"
        sending = asyncio.create_task(backend.run())
        for place, name in enumerate("ab"):
            old = backend.gateways[place]
            old.popen.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(old.popen.wait, 30) == 0
            backend.gateways[place] = await asyncio.to_thread(start, name)
            await asyncio.sleep(3)  # all of them are back: they are to within one second
        sending.cancel()
        await asyncio.wait({sending})
        told, _ = await asyncio.to_thread(fleet.communicate, "\n")
    check(json.loads(told), backend.sent)


def check(devices: list[dict[str, Any]], sent: dict[int, tuple[float, float]]) -> None:
    handshakes = sorted(seconds for device in devices for seconds in device["handshakes"])
    print(
        f"handshakes {len(handshakes)}, longest {handshakes[-1]:.3f} s, refused "
        f"{sum(device['refused'] for device in devices)}, reset "
        f"{sum(device['reset'] for device in devices)}, messages {len(sent)}"
    )
    assert len(sent) > 50
    assert handshakes[-1] < 5, (
        "a second when nothing else runs; the rest is slack for a busy machine"
    )
    for device in devices:
        assert len(device["here"]) >= 2
        assert device["reset"] + device["refused"] <= 2, device
        assert len(device["got"]) == len(set(device["got"])), "got something twice"
        for number, (began, ended) in sent.items():
            if any(since <= began and ended <= until for since, until in device["here"]):
                assert number in device["got"], (number, device["here"])
