"""Many connections: what they leave behind, and that a crowd delays nobody for long."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Accounts, Instance, ask, eventually, running_gateway
from wsgateway import auth, store

pytestmark = [pytest.mark.load, pytest.mark.timeout(600)]

BENCH = Path(__file__).parent.parent / "scripts" / "bench"

PATIENT = {"keepalive__interval": 300, "keepalive__timeout": 300}
"""The load generator answers no pings while it is busy, which takes long on a busy machine."""

LOAD = """
import sys
from load import Load
port, idle, each, *rounds = map(int, sys.argv[1:])
held = Load(port, idle)
for count in rounds:
    for _ in range(count):
        Load(port, each).close()
    print("done", flush=True)
    sys.stdin.readline()
held.close()
"""


@pytest.fixture
async def crowd(accounts: Accounts) -> Accounts:
    """A database with the thousand tokens of the load generator."""
    async with store.open_to_write(accounts.path) as db:
        for number in range(1, 1001):
            user = await db.add_user(f"user-{number}")
            await db.bind(user, await db.add_device(f"device-{number}"))
            await db.add_token(auth.hash_token(f"bench-{number}"), user, "device")
    return accounts


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Generator:
    """The load generator as a process, which says how far it is and waits to be told to go on."""

    def __init__(self, gateway: Instance, idle: int, each: int, *rounds: int) -> None:
        words = [str(number) for number in (gateway.port, idle, each, *rounds)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOAD, *words], env=os.environ | {"PYTHONPATH": str(BENCH)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    async def done(self) -> None:
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line == "done\n"

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    async def end(self) -> None:
        await asyncio.to_thread(self._process.communicate)
        assert self._process.returncode == 0


async def test_fifty_thousand_comings_and_goings_leave_nothing_behind(crowd: Accounts) -> None:
    async with running_gateway(crowd, **PATIENT) as gateway:
        hub, listener = gateway.running.instance.gateway.hub, gateway.running.instance.listener
        load = Generator(gateway, 1000, 1000, 5, 50)
        await load.done()
        await eventually(lambda: listener.connections == 1000, 60)
        before = resident_bytes()
        load.go_on()
        async with asyncio.timeout(400):
            await load.done()
        await eventually(lambda: listener.connections == 1000, 60)
        grown = resident_bytes() / before - 1
        load.go_on()
        await load.end()
        await eventually(lambda: listener.connections == 0, 60)
        assert grown < 0.1
        assert len(hub) == 0
        assert len(gateway.running.instance.admission.departed) == 0
        for registry in ("_handshakes", "_closing", "_congested", "_tasks"):
            assert not getattr(listener, registry), registry
        assert not any(listener._wheel)
        assert gateway.running.instance.metrics.opened == 56_000


async def test_a_crowd_that_comes_at_once_does_not_hold_up_a_device(crowd: Accounts) -> None:
    async with running_gateway(crowd, **PATIENT) as gateway, gateway.device() as device:
        load = Generator(gateway, 1000, 1000, 5)
        loop, waits = asyncio.get_running_loop(), list[float]()
        done = asyncio.create_task(load.done())
        while not done.done() and len(waits) < 90:
            sent_at = loop.time()
            assert (await ask(device, {"type": "ping"}))["type"] == "pong"
            waits.append(loop.time() - sent_at)
            await asyncio.wait({done}, timeout=0.05)
        await done
        load.go_on()
        await load.end()
        assert sorted(waits)[len(waits) // 2] < 0.5
