"""Who is online can be read in Redis by any program, and nobody stays there who is gone."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import orjson
import pytest
import redis
from websockets.sync.client import connect

from tests.conftest import (
    Accounts,
    Process,
    RedisServer,
    ask,
    eventually,
    running_gateway,
)
from tests.test_cluster import SHARED, backend, bob, others, pair, received, until
from wsgateway import store

pytestmark = pytest.mark.long

__all__ = ["bob"]

BEAT = 3 + 2
"""Seconds within which Redis knows of a change, with slack."""


async def test_the_keys_say_who_is_online_where_and_since_when(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:

        async def entry() -> dict[str, str]:
            found = await p.redis.hgetall("wsgateway:online:b")
            return orjson.loads(next(iter(found.values()), b"{}"))

        await until(entry, BEAT)
        user = (await p.data(p.a, "GET", "/api/users/1"))["connections"]
        assert [one["id"].encode() for one in user] == await p.redis.hkeys("wsgateway:online:b")
        first = await entry()
        assert (first["user_id"], first["device_id"]) == (1, 1)
        for key in ("since", "last_activity"):
            age = datetime.now(UTC) - datetime.fromisoformat(first[key])
            assert -1 < age.total_seconds() < 20
        assert 0 < await p.redis.ttl("wsgateway:online:b") <= 15
        assert not await p.redis.exists("wsgateway:online:a")
        beats = dict(await p.redis.zrange("wsgateway:instances", 0, -1, withscores=True))
        assert beats.keys() == {b"a", b"b"}
        assert all(abs(time.time() - at) < 15 for at in beats.values())
        await ask(device, {"type": "ping"})

        async def is_newer() -> bool:
            return (await entry())["last_activity"] > first["last_activity"]

        await until(is_newer, BEAT)
        await device.close()

        async def is_gone() -> bool:
            return not await p.redis.hlen("wsgateway:online:b")

        await until(is_gone, BEAT)


async def test_an_instance_that_stops_leaves_no_key(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, server__instance="a", **overrides) as a,
    ):
        client = make(a, a).redis
        async with (
            running_gateway(accounts, server__instance="b", **overrides) as b,
            b.device(),
        ):
            await until(lambda: client.exists("wsgateway:online:b"), BEAT)
        assert await client.exists("wsgateway:online:b", "wsgateway:alive:b") == 0
        assert await client.zscore("wsgateway:instances", "b") is None


async def test_lost_data_is_written_again_within_a_beat(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        keys = ("wsgateway:online:b", "wsgateway:alive:b", "wsgateway:groups:b")

        async def are_there() -> bool:
            return (
                await p.redis.exists(*keys) == len(keys)
                and await p.redis.zcard("wsgateway:instances") == 2
            )

        await until(are_there, BEAT)
        await p.redis.flushall()
        await until(are_there, BEAT)
        assert {b"user_1", b"device_1"} <= await p.redis.smembers("wsgateway:groups:b")
        _, receipt = await p.send(p.a, 1, "fine")
        assert (receipt["matched"], receipt["complete"]) == (1, True)
        assert await received(device) == "fine"


async def test_an_instance_that_comes_back_under_its_name_leaves_nobody_waiting(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, server__instance="a", **overrides) as a,
    ):
        async with (
            running_gateway(accounts, server__instance="b", **overrides) as b,
            b.device(bob),
        ):
            await eventually(lambda: others(a) == ["b"])
        async with running_gateway(accounts, server__instance="b", **overrides) as b:
            await eventually(lambda: others(a) == ["b"])
            p = make(a, b)

            async def is_complete() -> bool:
                _, receipt = await p.send(a, 2, "x", "?timeout=0.2")
                return bool(receipt["complete"])

            await until(is_complete, 5)


async def alice_with_key(path: Path) -> tuple[Accounts, str]:
    """A database with a user who has a token and a key."""
    accounts = Accounts(path)
    async with store.open_to_write(path, create=True) as db:
        await db.add_user("alice")
    accounts.token = await accounts.add_token()
    return accounts, await accounts.add_token(scope="admin")


@pytest.mark.timeout(90)
@pytest.mark.faults
def test_a_killed_instance_disappears_with_its_users_and_comes_back_without_ghosts(
    tmp_path: Path,
    redis_server: RedisServer,
    serve: Callable[..., Process],
) -> None:
    accounts, key = asyncio.run(alice_with_key(tmp_path / "wsgateway.db"))

    def start(name: str) -> Process:
        return serve(
            WSGATEWAY_AUTH_DATABASE=str(accounts.path),
            WSGATEWAY_REDIS_URL=redis_server.url,
            WSGATEWAY_SERVER_INSTANCE=name,
        )

    def online(process: Process) -> tuple[dict[int, list[str]], bool]:
        async def get() -> bytes:
            async with aiohttp.ClientSession(headers={"X-API-Key": key}) as http:
                url = f"http://127.0.0.1:{process.api_port}/api/users/online"
                async with http.get(url) as response:
                    return await response.read()

        answer = orjson.loads(asyncio.run(get()))["data"]
        users = {one["user_id"]: sorted(one["instances"]) for one in answer["users"]}
        return users, answer["complete"]

    def wait_for(condition: Callable[[], object], seconds: float) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds
            time.sleep(0.1)
        return time.monotonic() - began

    a, b = start("a"), start("b")
    wait_for(lambda: online(a) == ({}, True), 10)
    path = f"/ws/device/?token={accounts.token}"
    with contextlib.ExitStack() as stack, redis.Redis(port=redis_server.port) as client:
        stack.enter_context(connect(f"ws://127.0.0.1:{b.port}{path}", compression=None))
        wait_for(lambda: online(a) == ({1: ["b"]}, True), 10)
        wait_for(lambda: client.hlen("wsgateway:online:b") == 1, 10)
        b.stop(signal.SIGKILL)
        wait_for(lambda: online(a) == ({}, True), 15 + 3)
        wait_for(lambda: not client.exists("wsgateway:online:b", "wsgateway:alive:b"), 15 + 3)

    b = start("b")
    with contextlib.ExitStack() as stack, redis.Redis(port=redis_server.port) as client:
        stack.enter_context(connect(f"ws://127.0.0.1:{b.port}{path}", compression=None))
        wait_for(lambda: online(a) == ({1: ["b"]}, True), 10)
        wait_for(lambda: client.hlen("wsgateway:online:b") == 1, 10)
        [before] = client.hkeys("wsgateway:online:b")
        b.stop(signal.SIGKILL)
        b = start("b")  # at once, before what it was has expired
        wait_for(lambda: not client.hexists("wsgateway:online:b", before), 5)
        wait_for(lambda: online(a) == ({}, True), 5)
