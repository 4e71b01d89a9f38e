"""Services that fail in every way harm no device that only pings."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.conftest import Accounts, Process
from tests.services import (
    KEY,
    TROUBLES,
    Fake,
    abort,
    answering,
    chat_flags,
    chunk,
    openai,
    qweather,
    streamed,
    weather_flags,
)

pytestmark = [pytest.mark.load, pytest.mark.timeout(300)]

DEVICES = 200
ROUNDS = 6
"""Times that each device asks for weather and then chats."""

PING_SECONDS = 0.2
"""Between two pings of a device."""

BOUND = 2.0
"""Seconds of the 99th percentile: under 0.05 on a quiet machine, where the services, 400 devices and
the gateway do not share two cores with other tests."""

QUICK: dict[str, Any] = {
    "weather__timeout": 2, "weather__call_timeout": 0.5, "weather__cache_ttl": 0,
    "weather__breaker_failures": 10**6, "weather__breaker_pause": 0.05,
    "chat__timeout": 6, "chat__first_byte_timeout": 0.5, "chat__stream": True,
    "chat__breaker_failures": 10**6, "chat__breaker_pause": 0.05, "chat__concurrency_per_user": 100,
    "limits__connections_per_user": 1000, "limits__messages": 100_000,
    "server__host": "127.0.0.1",
}  # fmt: skip
"""Failing services do not keep the test waiting, and no breaker keeps them from failing."""


AT_ONCE = answering("{}", 429, retry_after_ms="50")
WAYS = [*({**TROUBLES, "limited": AT_ONCE}).values()]


def styles(fake: Fake) -> list[Any]:
    """Every way to fail of the weather service, and some good answers."""
    problem = json.dumps({"error": {"status": 400, "title": "NO SUCH LOCATION"}})
    return [
        *WAYS, fake.hang, *[qweather] * 10,
        answering('{"code":"404"}'), answering('{"code":"500"}'),
        answering(problem, 400, Content_Type="application/problem+json"),
    ]  # fmt: skip


def streams(fake: Fake) -> list[Any]:
    """Every way to fail of the chat service, and some good answers."""
    half = chunk("half")
    raw = (half + chunk(finish="stop") + "data: [DONE]\n\n").encode()
    return [
        *WAYS, fake.hang, openai, openai,
        streamed(half, then=fake.hang), streamed(half, then=abort), streamed(half),
        streamed(half, 'data: {"error":{"message":"x"}}\n\n'),
        streamed(*[raw[at : at + 3] for at in range(0, len(raw), 3)]),
        answering('{"error":{}}', 400), answering('{"choices":[]}'),
    ]  # fmt: skip


def endlessly(fake: Fake, replies: list[Any]) -> None:
    """Answer in each of these ways in turn, for ever."""
    turns = itertools.cycle(replies)

    async def turn(request: Any) -> Any:
        return await next(turns)(request)

    fake.good = turn


async def ask_for_answers(device: ClientConnection, number: int, heard: Counter[str]) -> None:
    """Ask for weather and chat; each question has one answer or clear error."""
    for turn in range(ROUNDS):
        for kind, message in (
            ("weather", {"city": f"city {number} {turn}"}),
            ("chat_message", f"hello {turn}"),
        ):
            await device.send(orjson.dumps({"type": kind, "message": message}).decode())
            answer = {"type": "chat_delta"}
            while answer["type"] == "chat_delta":
                answer = orjson.loads(await device.recv())
            assert answer["type"] in ("weather_response", "chat_response", "error"), answer
            assert answer.get("code", "SERVICE_ERROR") == "SERVICE_ERROR"
            assert KEY not in str(answer)
            heard[answer["message"] if answer["type"] == "error" else answer["type"]] += 1


async def ping(device: ClientConnection, until: asyncio.Event, waits: list[float]) -> None:
    """Ping now and then until told; how long each answer took."""
    loop, stop = asyncio.get_running_loop(), asyncio.create_task(until.wait())
    while not stop.done():
        sent_at = loop.time()
        await device.send('{"type":"ping"}')
        assert orjson.loads(await device.recv())["type"] == "pong"
        waits.append(loop.time() - sent_at)
        await asyncio.wait({stop}, timeout=PING_SECONDS)


async def connected(url: str, count: int, **options: Any) -> list[ClientConnection]:
    devices = [await connect(url, compression=None, **options) for _ in range(count)]
    for device in devices:
        await device.recv()
    return devices


def p99(waits: list[float]) -> float:
    return sorted(waits)[int(len(waits) * 0.99)]


async def test_devices_that_ping_are_answered_while_services_fail_in_every_way(
    accounts: Accounts, serve: Callable[..., Process]
) -> None:
    async with Fake(qweather).running() as weather, Fake(openai).running() as chat:
        endlessly(weather, styles(weather))
        endlessly(chat, streams(chat))
        flags = weather_flags(weather) | chat_flags(chat) | QUICK
        flags |= {"auth__database": str(accounts.path)}
        words = [f"{key.replace('__', '.', 1)}={value}" for key, value in flags.items()]
        gateway = await asyncio.to_thread(
            serve, *itertools.chain(*[("--set", word) for word in words])
        )
        url = f"ws://127.0.0.1:{gateway.port}/ws/device/?token={accounts.token}"
        pinging = await connected(url, DEVICES)
        asking = await connected(url, DEVICES, subprotocols=["wsgateway.v1"])

        quiet, stop = list[float](), asyncio.Event()
        asyncio.get_running_loop().call_later(2, stop.set)
        await asyncio.gather(*[ping(device, stop, quiet) for device in pinging])

        waits, heard, stop = list[float](), Counter[str](), asyncio.Event()
        pings = [asyncio.create_task(ping(device, stop, waits)) for device in pinging]
        questions = [ask_for_answers(device, n, heard) for n, device in enumerate(asking)]
        await asyncio.gather(*questions)
        stop.set()
        await asyncio.gather(*pings)
        assert heard.total() == DEVICES * ROUNDS * 2
        print(f"\npings: p99 {p99(waits) * 1000:.1f} ms of {len(waits)}, worst "
              f"{max(waits) * 1000:.1f} ms; without questions p99 {p99(quiet) * 1000:.1f} ms")  # fmt: skip
        for what, times in heard.most_common():
            print(f"{times:6} {what}")
        assert p99(waits) < BOUND
        assert heard["weather_response"] > 0
        assert heard["chat_response"] > 0
        await asyncio.gather(*[device.close() for device in (*pinging, *asking)])
        said = gateway.log.read_text()
        assert "Traceback" not in said
        assert KEY not in said
        assert await asyncio.to_thread(gateway.stop) == 0
