"""A send through the HTTP API reaches its devices on every instance, and its receipt is honest."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from tests.conftest import Accounts, RedisServer, eventually
from tests.test_cluster import Pair, bob, metrics, others, pair, received

__all__ = ["bob"]

TARGETS = {
    "user": "/api/users/1/messages",
    "device": "/api/devices/1/messages",
    "all": "/api/broadcast",
}


@pytest.mark.parametrize("path", TARGETS.values(), ids=TARGETS)
async def test_a_send_reaches_the_devices_of_both_instances(
    accounts: Accounts, redis_server: RedisServer, path: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device() as first, p.b.device() as second, p.b.device() as third,
    ):  # fmt: skip
        for instance in (p.a, p.b):
            message = {"text": "你好", "from": instance.port}
            status, answer = await p.call(instance, "POST", path, {"message": message})
            assert status == 200
            for device in (first, second, third):
                async with asyncio.timeout(5):
                    assert orjson.loads(await device.recv()) == answer["data"]
            delivery = answer["delivery"]
            assert delivery.pop("id")
            assert delivery.pop("users", 1) == 1
            assert delivery == {
                "matched": 3,
                "written": 3,
                "dropped": 0,
                "instances": {"a": 1, "b": 2},
                "complete": True,
                "online": True,
            }


async def test_a_broadcast_counts_users_once_however_many_connections_they_have(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device(), p.a.device(), p.b.device(), p.b.device(bob),
    ):  # fmt: skip
        for instance in (p.a, p.b):
            _, answer = await p.call(instance, "POST", "/api/broadcast", {"message": 1})
            assert (answer["delivery"]["matched"], answer["delivery"]["users"]) == (4, 2)


async def mute(p: Pair, *groups: str) -> None:
    """Let an instance appear that listens to groups and never answers."""
    await p.redis.sadd("wsgateway:groups:mute", "all", *groups)
    await p.redis.publish("wsgateway:all", b"b mute\n{}")
    await eventually(lambda: "mute" in others(p.a) and "mute" in others(p.b))


async def test_only_instances_that_listen_are_waited_for(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        await mute(p, "user_2")
        _, receipt = await p.send(p.a, 1, "fine", "?timeout=30")
        assert (receipt["instances"], receipt["complete"]) == ({"a": 0, "b": 1}, True)
        assert await received(device) == "fine"
        _, receipt = await p.send(p.a, 2, "who?", "?timeout=0.2")
        assert (receipt["matched"], receipt["complete"]) == (0, False)
        status, answer = await p.send(p.a, 2, "who?", "?timeout=0.2&require=online")
        assert (status, answer["code"]) == (504, "unknown")
        _, answer = await p.call(p.a, "POST", "/api/broadcast?timeout=0.2", {"message": "all"})
        assert answer["delivery"]["instances"] == {"a": 0, "b": 1}
        assert answer["delivery"]["complete"] is False
        assert await received(device) == "all"
        assert metrics(p.a).receipts_incomplete == 3


async def test_a_subscriber_who_is_no_instance_is_not_waited_for(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.redis.pubsub() as curious:
        await curious.psubscribe("wsgateway:*")
        async with p.b.device():
            _, receipt = await p.send(p.a, 1, "read by anybody", "?timeout=30")
            assert (receipt["matched"], receipt["complete"]) == (1, True)


async def test_an_answer_of_any_instance_counts(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.redis.pubsub() as ear:
        await mute(p, "user_1")
        await ear.subscribe("wsgateway:group:user_1")
        sending = asyncio.create_task(p.send(p.a, 1, "x", "?timeout=30"))
        async with asyncio.timeout(5):
            async for heard in ear.listen():
                if heard["type"] == "message":
                    break
        message_id = heard["data"].split(b"\n")[0].split(b" ")[-1].decode()
        word = {"type": "receipts", "from": "mute", "receipts": [[message_id, 3, 2, 1, []]]}
        await p.redis.publish("wsgateway:node:a", orjson.dumps(word))
        _, receipt = await sending
        assert receipt["instances"] == {"a": 0, "mute": 3}
        assert (receipt["matched"], receipt["written"], receipt["dropped"]) == (3, 2, 1)
        assert receipt["complete"]


async def test_who_does_not_want_to_wait_is_told_of_this_instance_alone(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        pair(accounts, redis_server) as p, p.a.device() as first, p.b.device() as second,
    ):  # fmt: skip
        status, receipt = await p.send(p.a, 1, "quick", "?wait=none")
        assert (status, receipt["instances"], receipt["complete"]) == (200, {"a": 1}, False)
        assert await received(first) == await received(second) == "quick"


async def test_nobody_online_is_a_success_unless_somebody_is_required(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p:
        status, receipt = await p.send(p.a, 2, "hello?")
        assert (status, receipt["matched"], receipt["complete"]) == (200, 0, True)
        assert receipt["online"] is False
        status, answer = await p.send(p.a, 2, "hello?", "?require=online")
        assert (status, answer["code"]) == (404, "offline")
        async with p.b.device(bob) as device:
            status, _ = await p.send(p.a, 2, "hello", "?require=online")
            assert status == 200
            assert await received(device) == "hello"


async def test_messages_of_one_sender_keep_their_order(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device(bob) as first, p.b.device(bob) as second,
    ):  # fmt: skip
        for number in range(50):
            await p.send(p.a, 2, number, "?wait=none")
        batch = [{"type": "t", "message": number, "user_id": 2} for number in range(50, 1000)]
        status, answer = await p.call(p.a, "POST", "/api/messages/batch?timeout=10", batch)
        assert status == 200
        results = answer["data"]["results"]
        assert [one["data"]["message"] for one in results] == list(range(50, 1000))
        assert all(one["delivery"]["matched"] == 2 for one in results)
        assert all(one["delivery"]["complete"] for one in results)
        for device in (first, second):
            assert [await received(device) for _ in range(1000)] == list(range(1000))
        assert metrics(p.b).mirror_lost == metrics(p.b).mirror_duplicates == 0


async def test_a_first_batch_to_a_user_who_is_elsewhere_keeps_its_order(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device(bob) as device:
        batch = [{"type": "t", "message": number, "user_id": 2} for number in range(300)]
        assert (await p.call(p.a, "POST", "/api/messages/batch?timeout=10", batch))[0] == 200
        assert [await received(device) for _ in range(300)] == list(range(300))


async def test_a_repeated_key_reaches_nobody_twice_whichever_instance_is_asked(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        pair(accounts, redis_server) as p, p.a.device() as first, p.b.device() as second,
    ):  # fmt: skip
        for instance in (p.a, p.b, p.a, p.b):
            status, _ = await p.send(instance, 1, "once", Idempotency_Key="k1")
            assert status == 200
        together = [p.send(one, 1, "at once", Idempotency_Key="k2") for one in (p.a, p.b) * 5]
        assert {status for status, _ in await asyncio.gather(*together)} == {200}
        await p.send(p.a, 1, "end")
        for device in (first, second):
            assert [await received(device) for _ in range(3)] == ["once", "at once", "end"]


async def test_a_repeated_key_has_the_receipt_of_the_first_and_another_body_is_a_conflict(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.a.device(bob) as device:
        for instance in (p.a, p.b, p.b):
            _, receipt = await p.send(instance, 2, "once", Idempotency_Key="k")
            assert (receipt["matched"], receipt["written"]) == (1, 1)
            assert receipt["instances"]["a"] == 1
        for instance in (p.a, p.b):
            status, answer = await p.send(instance, 2, "another body", Idempotency_Key="k")
            assert (status, answer["code"]) == (409, "conflict")
        batch = [
            {"type": "t", "message": "x", "user_id": 2, "id": "k"},
            {"type": "t", "message": "end", "user_id": 2},
        ]
        _, answer = await p.call(p.b, "POST", "/api/messages/batch", batch)
        assert [one.get("http_status", 200) for one in answer["data"]["results"]] == [409, 200]
        assert [await received(device) for _ in range(2)] == ["once", "end"]


async def test_sends_with_and_without_keys_of_one_batch_keep_their_order(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        pair(accounts, redis_server) as p, p.a.device() as first, p.b.device() as second,
    ):  # fmt: skip
        batch = [
            {"type": "t", "message": number, "user_id": 1}
            | ({"id": f"{number}"} if number % 3 else {})
            for number in range(100)
        ]
        await p.call(p.a, "POST", "/api/messages/batch?timeout=10", batch)
        for device in (first, second):
            assert [await received(device) for _ in range(100)] == list(range(100))


async def test_who_waits_no_time_is_told_as_who_does_not_want_to_wait(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device(bob) as device:
        for query in ("?timeout=0", "?wait=none"):
            status, receipt = await p.send(p.a, 2, "quick", query)
            assert (status, receipt["matched"], receipt["complete"]) == (200, 0, False)
            assert await received(device) == "quick"
            status, answer = await p.send(p.a, 2, "x", f"{query}&require=online")
            assert (status, answer["field"]) == (422, "require")
        redis_server.stop()
        await eventually(lambda: metrics(p.a).redis_states["publisher"] != "up")
        status, answer = await p.send(p.a, 2, "x", "?wait=none")
        assert (status, answer["code"]) == (503, "unavailable")


async def test_who_does_not_wait_is_served_while_only_the_subscriber_is_gone(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device(bob) as device:
        await p.redis.client_kill_filter(_type="pubsub", skipme=False)
        status, receipt = await p.send(p.a, 2, "maybe", "?wait=none")
        assert (status, receipt["complete"]) == (200, False)
        await eventually(
            lambda: (
                metrics(p.a).redis_states["subscriber"] == "up"
                and metrics(p.b).redis_states["subscriber"] == "up"
            ),
            10,
        )
        await p.send(p.a, 2, "end", "?wait=none")
        assert await received(device) in ("maybe", "end")


async def test_keys_belong_to_their_caller(accounts: Accounts, redis_server: RedisServer) -> None:
    key = await accounts.add_token(scope="api")
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        others_headers: dict[str, Any] = {"Authorization": f"Token {key}"}
        await p.send(p.a, 1, "mine", Idempotency_Key="k")
        await p.send(p.a, 1, "theirs", Idempotency_Key="k", **others_headers)
        assert [await received(device) for _ in range(2)] == ["mine", "theirs"]
