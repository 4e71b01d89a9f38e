"""The queue: what old backends LPUSH arrives in order, and nothing of it is lost or blocks it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
import pytest

from tests.conftest import Accounts, RedisServer, eventually, running_gateway
from tests.test_cluster import SHARED, Pair, backend, bob, metrics, pair, received, until

__all__ = ["bob"]

QUEUE = "device_messages"
REJECTED = "wsgateway:rejected"


def item(message: Any, user_id: Any = 1) -> bytes:
    """An item as the old backend writes it."""
    return orjson.dumps(
        {
            "user_id": user_id,
            "message": {"type": "t", "message": message},
            "timestamp": "2026-11-22T22:16:44.524210+00:00",
        }
    )


async def is_empty(p: Pair) -> bool:
    keys = [QUEUE, "wsgateway:processing:a", "wsgateway:processing:b"]
    return not await p.redis.exists(*keys)


@pytest.mark.parametrize("user_id", [1, "1"], ids=["number", "string"])
async def test_what_is_pushed_as_ever_reaches_the_devices_of_both(
    accounts: Accounts, redis_server: RedisServer, user_id: int | str
) -> None:
    async with (
        pair(accounts, redis_server) as p, p.a.device() as first, p.b.device() as second,
    ):  # fmt: skip
        pushed = {"type": "custom", "message": {"text": "你好"}, "more": 1}
        await p.redis.lpush(
            QUEUE, orjson.dumps({"user_id": user_id, "message": pushed, "timestamp": "x"})
        )
        for device in (first, second):
            async with asyncio.timeout(10):
                assert orjson.loads(await device.recv()) == pushed
        await until(lambda: is_empty(p))


async def test_five_hundred_items_keep_their_order_on_both_instances(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        pair(accounts, redis_server) as p, p.a.device() as first, p.b.device() as second,
    ):  # fmt: skip
        async with p.redis.pipeline(transaction=False) as pipe:
            for number in range(500):
                pipe.lpush(QUEUE, item(number))
            await pipe.execute()
        for device in (first, second):
            assert [await received(device, 20) for _ in range(500)] == list(range(500))
        await until(lambda: is_empty(p))
        assert metrics(p.a).queue_items + metrics(p.b).queue_items == {"sent": 500}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(b"", "not a JSON object", id="nothing"),
        pytest.param(b"\xff\xfe", "not a JSON object", id="no UTF-8"),
        pytest.param(b"[1]", "not a JSON object", id="a list"),
        pytest.param(b'{"user_id": 1, "mess', "not a JSON object", id="cut off"),
        pytest.param(item(1, None), "user_id is no number", id="user_id null"),
        pytest.param(item(1, "x"), "user_id is no number", id="user_id a word"),
        pytest.param(item(1, -1), "user_id is no number", id="user_id negative"),
        pytest.param(item(1, 1.0), "user_id is no number", id="user_id with a fraction"),
        pytest.param(item(1, True), "user_id is no number", id="user_id true"),
        pytest.param(item(1, "²"), "user_id is no number", id="user_id a superscript"),
        pytest.param(b'{"message": {}}', "user_id is no number", id="no user_id"),
        pytest.param(b'{"user_id": 1}', "message is no object", id="no message"),
        pytest.param(b'{"user_id":1,"message":"x"}', "message is no object", id="message a text"),
        pytest.param(item("x" * 70_000), "message is too long", id="message too long"),
        pytest.param(b'{"user_id":1,"message":' + b'{"a":' * 600 + b"1" + b"}" * 601,
                     "not a JSON object", id="too deep"),
    ],
)  # fmt: skip
async def test_a_bad_item_is_put_aside_with_its_reason_and_stops_nothing(
    accounts: Accounts, redis_server: RedisServer, bad: bytes, reason: str
) -> None:
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, server__instance="a", **overrides) as a,
        a.device() as device,
    ):
        p = make(a, a)
        await p.redis.lpush(QUEUE, item("before"))
        await p.redis.lpush(QUEUE, bad)
        await p.redis.lpush(QUEUE, item("after"))
        assert [await received(device) for _ in range(2)] == ["before", "after"]
        [record] = await p.redis.lrange(REJECTED, 0, -1)
        kept = orjson.loads(record)
        assert kept["reason"] == reason
        assert kept["item"] == bad[:10_240].decode(errors="replace")
        assert kept["timestamp"]
        assert await p.data(a, "GET", "/api/queue") == {"waiting": 0, "rejected": 1}


async def test_the_reject_list_is_capped(accounts: Accounts, redis_server: RedisServer) -> None:
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, redis__url=redis_server.url, queue__rejected=5, **SHARED) as a,
        a.device() as device,
    ):
        p = make(a, a)
        await p.redis.lpush(QUEUE, *(f"bad {number}" for number in range(20)), item("end"))
        assert await received(device) == "end"
        kept = [orjson.loads(one)["item"] for one in await p.redis.lrange(REJECTED, 0, -1)]
        assert kept == [f"bad {number}" for number in range(19, 14, -1)]


async def test_size_enqueue_and_clear_over_http(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, redis__url=redis_server.url, **SHARED) as a,
        a.device() as device,
    ):
        p = make(a, a)
        await p.redis.lpush(QUEUE, item("first"))
        assert await received(device) == "first"
        body = {"user_id": 1, "message": {"type": "t", "message": "second"}}
        assert (await p.data(a, "POST", "/api/queue", body))["waiting"] <= 1
        assert await received(device) == "second"
        # Nobody takes items while another holds the lease.
        await p.redis.set("wsgateway:queue:lease", "somebody else", px=60_000)
        await until(lambda: _nobody_pops(p), 15)
        for number in range(3):
            answer = await p.data(a, "POST", "/api/queue", body | {"user_id": "1"})
            assert answer == {"waiting": number + 1}
        for bad, code, field in (
            ({"user_id": 99}, 404, "user_id"),
            ({"message": {"text": "x" * 70_000}}, 413, None),
        ):
            status, answer = await p.call(a, "POST", "/api/queue", body | bad)
            assert (status, answer.get("field")) == (code, field)
        assert (await p.data(a, "GET", "/api/queue"))["waiting"] == 3
        assert await p.data(a, "DELETE", "/api/queue") == {"cleared": 3}
        assert (await p.data(a, "GET", "/api/queue"))["waiting"] == 0


async def _nobody_pops(p: Pair) -> bool:
    """Whether items stay where they are."""
    await p.redis.lpush(QUEUE, item("for nobody", 999))
    await asyncio.sleep(0.2)
    return await p.redis.delete(QUEUE) == 1


async def holder(p: Pair) -> str:
    return ((await p.redis.get("wsgateway:queue:lease")) or b"").decode().partition(":")[0]


async def test_the_next_instance_takes_over_when_the_holder_stops(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        contextlib.AsyncExitStack() as stack,
    ):
        first = contextlib.AsyncExitStack()
        a = await first.enter_async_context(
            running_gateway(accounts, server__instance="a", **overrides)
        )
        b = await stack.enter_async_context(
            running_gateway(accounts, server__instance="b", **overrides)
        )
        device = await stack.enter_async_context(b.device())
        p = make(a, b)
        await until(lambda: _is("a", p))
        await p.redis.lpush(QUEUE, item("through a"))
        assert await received(device) == "through a"
        await first.aclose()
        assert await holder(p) != "a"
        await p.redis.lpush(QUEUE, item("through b"))
        assert await received(device, 3 + 10) == "through b"
        assert await holder(p) == "b"


async def _is(name: str, p: Pair) -> bool:
    return await holder(p) == name


async def test_what_a_dead_instance_had_in_hand_is_sent_first(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with backend(redis_server) as make:
        client = make(None, None).redis
        # As after kill -9: the name, its list, and a lease that has run out.
        await client.sadd("wsgateway:queue:holders", "dead")
        await client.lpush("wsgateway:processing:dead", item("in hand"))
        await client.lpush(QUEUE, item("waiting"))
        async with (
            running_gateway(
                accounts, redis__url=redis_server.url, server__instance="b",
                queue__enabled=False,
            ) as silent,
            silent.device() as device,
            running_gateway(accounts, redis__url=redis_server.url, server__instance="a") as a,
        ):  # fmt: skip
            assert [await received(device) for _ in range(2)] == ["in hand", "waiting"]
            await eventually(lambda: metrics(a).queue_items == {"put_back": 1, "sent": 2})
            assert not await client.exists("wsgateway:processing:dead")


async def test_a_queue_that_is_no_list_is_read_again_once_it_is_one(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, redis__url=redis_server.url, **SHARED) as a,
        a.device() as device,
    ):
        p = make(a, a)
        await p.redis.set(QUEUE, "no list")
        status, answer = await p.call(a, "GET", "/api/queue")
        assert (status, answer["code"]) == (503, "unavailable")
        body = {"user_id": 1, "message": {}}
        assert (await p.call(a, "POST", "/api/queue", body))[0] == 503
        await p.redis.delete(QUEUE)
        await p.redis.lpush(QUEUE, item("fine"))
        assert await received(device, 15) == "fine"


async def test_without_redis_the_calls_about_the_queue_say_so(accounts: Accounts) -> None:
    key = await accounts.add_token(scope="admin")
    server = RedisServer(accounts.path.parent)  # not started
    async with backend(server) as make, running_gateway(accounts) as a:
        p = make(a, a)
        for method in ("GET", "DELETE"):
            header = {"Authorization": f"Token {key}"}
            status, answer = await p.call(a, method, "/api/queue", **header)
            assert (status, answer["code"]) == (503, "unavailable")
