"""Two instances on one Redis behave as one: who is online, cutting, revoking, coming and going."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import redis.asyncio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests.conftest import Accounts, Instance, RedisServer, ask, eventually, running_gateway
from wsgateway import store
from wsgateway.metrics import Metrics

Answer = dict[str, Any]

KEY = "the backend's own key"

SHARED: dict[str, object] = {
    "api__keys": [
        {
            "name": "backend",
            "sha256": hashlib.sha256(KEY.encode()).hexdigest(),
            "scope": "admin",
        }
    ]
}
"""What all instances are configured with: a key that is no token of a database."""


@dataclass
class Pair:
    """Instances `a` and `b`, a caller of their HTTP APIs, and a program that is on their Redis."""

    a: Instance
    b: Instance
    http: aiohttp.ClientSession
    redis: redis.asyncio.Redis

    async def call(
        self, instance: Instance, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, Answer]:
        """The status and the document that a call is answered with."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            headers["Content-Type"] = "application/json"
        async with self.http.request(
            method,
            instance.api_url + path,
            data=None if body is None else orjson.dumps(body),
            headers=headers,
        ) as response:
            return response.status, await response.json()

    async def data(self, instance: Instance, method: str, path: str, body: object = None) -> Answer:
        """The data of a call that succeeds."""
        status, document = await self.call(instance, method, path, body)
        assert status == 200, document
        data: Answer = document["data"]
        return data

    async def send(
        self, instance: Instance, user_id: int, message: object, query: str = "", **headers: str
    ) -> tuple[int, Answer]:
        """Send to a user; the status, and the receipt or the error."""
        body = {"type": "t", "message": message, "user_id": user_id}
        status, document = await self.call(
            instance, "POST", f"/api/messages{query}", body, **headers
        )
        return status, document.get("delivery", document)


def metrics(instance: Instance) -> Metrics:
    return instance.running.instance.metrics


def others(instance: Instance) -> list[str]:
    return instance.running.instance.cluster.others


@contextlib.asynccontextmanager
async def backend(server: RedisServer) -> AsyncIterator[Callable[..., Pair]]:
    """Makes a pair of two instances, with a key of scope admin."""
    headers = {"Authorization": f"Bearer {KEY}"}
    client = redis.asyncio.Redis(port=server.port, protocol=2)
    async with aiohttp.ClientSession(headers=headers) as http, client:
        yield lambda a, b: Pair(a, b, http, client)


@contextlib.asynccontextmanager
async def pair(
    accounts: Accounts, server: RedisServer, other: Accounts | None = None, **overrides: object
) -> AsyncIterator[Pair]:
    """Two instances that know each other; `b` with a database of its own if one is given."""
    overrides = {"redis__url": server.url, **SHARED, **overrides}
    async with (
        backend(server) as make,
        running_gateway(accounts, server__instance="a", **overrides) as a,
        running_gateway(other or accounts, server__instance="b", **overrides) as b,
    ):
        await eventually(lambda: others(a) == ["b"] and others(b) == ["a"])
        yield make(a, b)


async def received(device: ClientConnection, seconds: float = 10) -> Any:
    """What the next message says."""
    async with asyncio.timeout(seconds):
        return orjson.loads(await device.recv())["message"]


async def close_code(device: ClientConnection, seconds: float = 10) -> int | None:
    """How a connection was ended."""
    async with asyncio.timeout(seconds):
        await device.wait_closed()
    return device.close_code


async def until(condition: Callable[[], Any], seconds: float = 10, interval: float = 0.05) -> None:
    """Ask again and again (what is asked is awaited) until the answer is true."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(interval)


@pytest.fixture
async def bob(accounts: Accounts) -> str:
    """A token of user 2, who has device 2."""
    user_id, device_id = await accounts.add_user("bob", "lamp")
    assert (user_id, device_id) == (2, 2)
    return await accounts.add_token(user_id)


async def test_users_online_are_those_of_both(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device(), p.b.device(), p.b.device(bob),
    ):  # fmt: skip
        for instance in (p.a, p.b):
            answer = await p.data(instance, "GET", "/api/users/online")
            assert answer["complete"]
            alice, other = answer["users"]
            assert (alice["user_id"], alice["connections"]) == (1, 2)
            assert sorted(alice["instances"]) == ["a", "b"]
            assert (other["user_id"], other["connections"], other["instances"]) == (2, 1, ["b"])
            alice = await p.data(instance, "GET", "/api/users/1")
            assert alice["online"]
            assert {one["instance"] for one in alice["connections"]} == {"a", "b"}
            lamp = await p.data(instance, "GET", "/api/devices/2")
            assert [one["instance"] for one in lamp["connections"]] == ["b"]
            stats = await p.data(instance, "GET", "/api/stats")
            assert {name: one["connections"] for name, one in stats["instances"].items()} == {
                "a": 1,
                "b": 2,
            }


@pytest.mark.parametrize(("path", "part"), [("users/online", "users"), ("connections",) * 2])
async def test_pages_go_over_both_without_holes_or_repetitions(
    accounts: Accounts, redis_server: RedisServer, path: str, part: str
) -> None:
    async with pair(accounts, redis_server) as p, contextlib.AsyncExitStack() as stack:
        for number in range(2, 9):
            user_id, _ = await accounts.add_user(f"user-{number}")
            token = await accounts.add_token(user_id)
            instance = (p.a, p.b)[number % 2]
            await stack.enter_async_context(instance.device(token))
        rows, cursor = [], ""
        while cursor is not None:
            answer = await p.data(p.a, "GET", f"/api/{path}?limit=3{cursor}")
            assert answer["complete"]
            rows += answer[part]
            cursor = answer["next"] and f"&cursor={answer['next']}"
        assert sorted(row["user_id"] for row in rows) == list(range(2, 9))


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("POST users/1/disconnect", 4003),
        ("POST devices/1/disconnect", 4003),
        ("POST users/1/disable", 4001),
        ("DELETE tokens/1", 4001),
    ],
)
@pytest.mark.parametrize("caller", ["a", "b"])
async def test_cutting_reaches_both_and_counts_what_was_cut(
    accounts: Accounts, redis_server: RedisServer, bob: str, call: str, code: int, caller: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device() as first, p.b.device() as second, p.b.device() as third,
        p.b.device(bob) as stranger,
    ):  # fmt: skip
        method, path = call.split()
        body = {} if method == "POST" else None
        answer = await p.data(getattr(p, caller), method, f"/api/{path}", body)
        assert (answer["cut"], answer["complete"]) == (3, True)
        assert answer["instances"] == {"a": 1, "b": 2}
        for device in (first, second, third):
            assert await close_code(device, 2) == code
        await p.send(p.a, 2, "still here")
        assert await received(stranger) == "still here"


async def test_one_connection_is_cut_wherever_it_is(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        pair(accounts, redis_server) as p, p.a.device() as stays, p.b.device() as goes,
    ):  # fmt: skip
        user = await p.data(p.a, "GET", "/api/users/1")
        [one] = [row["id"] for row in user["connections"] if row["instance"] == "b"]
        answer = await p.data(p.a, "DELETE", f"/api/connections/{one}")
        assert answer == {"cut": 1, "instances": {"a": 0, "b": 1}, "complete": True}
        assert await close_code(goes) == 4003
        await p.send(p.b, 1, "stays")
        assert await received(stays) == "stays"
        assert (await p.call(p.a, "DELETE", f"/api/connections/{one}"))[0] == 404


@contextlib.asynccontextmanager
async def copied(accounts: Accounts, path: Path) -> AsyncIterator[Accounts]:
    """The same accounts in another database."""
    with (
        contextlib.closing(sqlite3.connect(accounts.path)) as source,
        contextlib.closing(sqlite3.connect(path)) as target,
    ):
        source.backup(target)
    yield Accounts(path, accounts.token)


async def test_a_token_revoked_on_one_host_ends_on_the_other_host_too(
    accounts: Accounts, redis_server: RedisServer, tmp_path: Path
) -> None:
    kept = await accounts.add_token()
    async with (
        copied(accounts, tmp_path / "other.db") as other,
        pair(accounts, redis_server, other) as p,
        p.a.device() as here, p.b.device() as there, p.b.device(kept) as stays,
    ):  # fmt: skip
        tokens = (await p.data(p.a, "GET", "/api/tokens"))["tokens"]
        token_id = min(row["id"] for row in tokens)
        answer = await p.data(p.a, "DELETE", f"/api/tokens/{token_id}")
        assert answer == {"cut": 2, "instances": {"a": 1, "b": 1}, "complete": True}
        assert await close_code(here, 2) == await close_code(there, 2) == 4001
        for database in (accounts, other):
            async with store.open_store(database.path) as db:
                [row] = [one for one in await db.tokens() if one.id == token_id]
                assert row.revoked_at is not None
        for instance in (p.a, p.b):
            with pytest.raises(InvalidStatus) as caught:
                await connect(instance.url())
            assert caught.value.response.status_code == 403
        await p.send(p.a, 1, "stays")
        assert await received(stays) == "stays"


async def test_a_user_disabled_on_one_host_is_out_on_the_other_until_enabled(
    accounts: Accounts, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        copied(accounts, tmp_path / "other.db") as other,
        pair(accounts, redis_server, other) as p,
        p.b.device() as there,
    ):
        assert (await p.data(p.b, "GET", "/api/users/1"))["online"]
        answer = await p.data(p.a, "POST", "/api/users/1/disable")
        assert answer["instances"] == {"a": 0, "b": 1}
        assert await close_code(there, 2) == 4001
        with pytest.raises(InvalidStatus):
            await connect(p.b.url())
        await p.data(p.a, "POST", "/api/users/1/enable")
        async with p.b.device():
            pass


async def test_an_instance_that_stops_says_good_bye(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, server__instance="a", **overrides) as a,
    ):
        async with running_gateway(accounts, server__instance="b", **overrides) as b:
            await eventually(lambda: others(a) == ["b"])
        await eventually(lambda: others(a) == [], 2)
        answer = await make(a, b).data(a, "GET", "/api/users/online")
        assert answer == {"users": [], "next": None, "complete": True}


async def test_an_instance_that_does_not_answer_makes_the_answer_incomplete(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        await p.redis.publish("wsgateway:all", b"b mute\n{}")
        await eventually(lambda: "mute" in others(p.a))
        answer = await p.data(p.a, "GET", "/api/users/online")
        assert [user["user_id"] for user in answer["users"]] == [1]
        assert answer["complete"] is False
        answer = await p.data(p.a, "POST", "/api/users/1/disconnect", {"reason": "moved"})
        assert (answer["cut"], answer["complete"]) == (1, False)
        assert set(answer["instances"]) == {"a", "b"}
        assert await close_code(device) == 4003
        assert device.close_reason == "moved"


async def test_invented_instances_are_believed_only_up_to_a_limit(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p:
        async with p.redis.pipeline(transaction=False) as pipe:
            for number in range(300):
                pipe.publish("wsgateway:all", f"b x{number}\n{{}}")
            await pipe.execute()
        await eventually(lambda: len(others(p.a)) >= 100)
        assert len(others(p.a)) == 100
        assert "b" in others(p.a)


async def test_two_instances_with_one_name_say_so_and_serve_on(
    accounts: Accounts, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    shared: dict[str, object] = {"redis__url": redis_server.url, "server__instance": "one"}
    async with (
        running_gateway(accounts, **shared) as first,
        running_gateway(accounts, **shared) as second,
    ):
        await eventually(lambda: metrics(first).mirror_twins and metrics(second).mirror_twins)
        for gateway in (first, second):
            async with gateway.device() as device:
                assert (await ask(device, {"type": "ping"}))["type"] == "pong"
        said = "another instance is named one too: rename one (server.instance)"
        assert caplog.text.count(said) >= 2
