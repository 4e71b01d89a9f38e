"""What instances pass on through Redis arrives once and in order, and nothing else is passed on."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import orjson
import pytest

from tests.conftest import Accounts, RedisServer, eventually, running_gateway
from tests.test_cluster import bob, metrics, others, pair, received, until
from wsgateway import envelope

__all__ = ["bob"]

USER = "wsgateway:group:user_1"
ALL = "wsgateway:all"
NODE = "wsgateway:node:b"


def sealed(seq: int, message_id: str | None = None, epoch: str = "e", message: Any = None) -> bytes:
    """A message of an instance that only the test knows."""
    payload = orjson.dumps({"type": "t", "message": seq if message is None else message})
    return envelope.seal("elsewhere", epoch, seq, message_id or envelope.new_id("q"), payload)


@pytest.mark.parametrize("channel", [USER, ALL, "wsgateway:group:device_1"])
async def test_a_bare_publish_reaches_the_devices_of_both(
    accounts: Accounts, redis_server: RedisServer, channel: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device() as first, p.b.device() as second,
    ):  # fmt: skip
        message = ' {"type": "t", "message": {"text": "你好"}, "more": [1, null]}'.strip()
        assert await p.redis.publish(channel, message) == 2
        for device in (first, second):
            async with asyncio.timeout(5):
                assert orjson.loads(await device.recv()) == orjson.loads(message)


@pytest.mark.parametrize("prefix", ["wsgateway:", "other:"])
async def test_deployments_with_other_prefixes_share_a_redis_without_meeting(
    accounts: Accounts, redis_server: RedisServer, prefix: str
) -> None:
    async with (
        pair(accounts, redis_server, redis__prefix=prefix) as p,
        running_gateway(
            accounts, server__instance="c", redis__url=redis_server.url, redis__prefix="third:"
        ) as third,
        third.device() as stranger,
        p.b.device() as device,
    ):
        _, receipt = await p.send(p.a, 1, "ours")
        assert receipt["instances"] == {"a": 0, "b": 1}
        assert await received(device) == "ours"
        assert others(third) == []
        await p.redis.publish("third:all", '{"type":"t","message":"theirs"}')
        assert await received(stranger) == "theirs"


async def test_the_same_envelope_twice_reaches_nobody_twice(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        one = sealed(1, "q-once")
        for data in (one, one, sealed(2, "q-once"), sealed(3, "q-other"), one):
            await p.redis.publish(USER, data)
        assert [await received(device) for _ in range(2)] == [1, 3]
        await p.redis.publish(USER, sealed(4))
        assert await received(device) == 4
        assert metrics(p.b).mirror_duplicates == 3
        assert metrics(p.b).mirror_lost == 0


async def test_an_instance_does_not_hear_itself(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.a.device() as device:
        for number in range(20):
            _, receipt = await p.send(p.a, 1, number)
            assert receipt["instances"] == {"a": 1}
        await p.redis.publish(USER, '{"type":"t","message":"last"}')
        assert [await received(device) for _ in range(21)] == [*range(20), "last"]


async def test_holes_and_what_is_missing_at_the_tail_are_counted_exactly(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        counts = metrics(p.b)
        for data, lost, gaps in [
            (sealed(7), 0, 0),  # where counting begins
            (sealed(8), 0, 0),
            (sealed(12), 3, 1),
            (sealed(10), 3, 1),  # late: counted as lost already, and dropped to keep the order
            (envelope.seal_beat("elsewhere", {USER: ("e", 12)}), 3, 1),
            (envelope.seal_beat("elsewhere", {USER: ("e", 16)}), 7, 2),
            (sealed(17), 7, 2),
            (sealed(3, epoch="f"), 9, 3),  # it was restarted, and two of its new life are missing
            (envelope.seal_beat("elsewhere", {"wsgateway:group:user_9": ("e", 5)}), 9, 3),
        ]:
            await p.redis.publish(ALL if data.startswith(b"b ") else USER, data)
            await p.redis.publish(USER, '{"type":"t","message":"mark"}')
            while await received(device) != "mark":
                pass
            assert (counts.mirror_lost, counts.mirror_gaps) == (lost, gaps), data


ON_A_GROUP = [
    (b"", "header"),
    (b"\x00\xff\xfe", "header"),
    (b"1 x y z", "header"),
    (b'1 x e 1 m\n{"a":"\xff"}', "utf8"),
    (b"1 x e 1 m\n{" + b" " * 70_000, "size"),
    (b'{"type":1}', "json"),
    (b"b x\n[]", "beat"),
]

ON_AN_INSTANCE = [
    (b"", "word"),
    (b"\xff", "word"),
    (b"[]", "word"),
    (b"null", "word"),
    (b'{"type":"receipts","from":"x","receipts":3}', "word"),
    (b'{"type":"receipts","from":"x","receipts":[[1]]}', "word"),
    (b'{"type":"receipts","from":"x","receipts":[[[],1,1,1,[]]]}', "word"),
    (b'{"type":"answer","from":"x"}', "word"),
    (b'{"type":"question","from":"x","id":"1","question":"what","about":{}}', "question"),
]


@pytest.mark.parametrize(
    ("channel", "garbage"),
    [
        pytest.param(USER, ON_A_GROUP, id="group"),
        pytest.param(ALL, ON_A_GROUP, id="all"),
        pytest.param(NODE, ON_AN_INSTANCE, id="node"),
    ],
)
async def test_garbage_is_counted_and_harms_nobody(
    accounts: Accounts, redis_server: RedisServer, channel: str, garbage: list[tuple[bytes, str]]
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        rejected: Counter[str] = Counter()
        for number, (data, reason) in enumerate(garbage):
            await p.redis.publish(channel, data)
            rejected[reason] += 1
            await eventually(lambda: metrics(p.b).mirror_rejected == rejected)
            _, receipt = await p.send(p.a, 1, number)
            assert (receipt["matched"], receipt["complete"]) == (1, True)
            assert await received(device) == number
        assert metrics(p.b).mirror_interruptions == 0


@pytest.mark.parametrize("time", [b"x", b"", b"nan", b"\xff"])
async def test_a_false_probe_does_not_end_the_connection(
    accounts: Accounts, redis_server: RedisServer, time: bytes
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as device:
        await until(lambda: p.redis.exists("wsgateway:alive:b"))
        about = orjson.loads(await p.redis.get("wsgateway:alive:b"))
        await p.redis.publish(NODE, f"probe {about['epoch']} ".encode() + time)
        await p.redis.publish(NODE, b"probe other " + time)
        for number in range(3):
            _, receipt = await p.send(p.a, 1, number)
            assert receipt["complete"]
            assert await received(device) == number
        assert metrics(p.b).mirror_interruptions == 0


async def test_who_is_told_that_he_is_connected_misses_nothing(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    users = [await accounts.add_user(f"user-{n}", f"device-{n}") for n in range(30)]
    tokens = [await accounts.add_token(user_id) for user_id, _ in users]
    async with pair(accounts, redis_server) as p:

        async def come(user_id: int, token: str) -> None:
            async with p.b.device(token) as device:
                _, receipt = await p.send(p.a, user_id, user_id)
                assert await received(device, 5) == user_id
                assert (receipt["matched"], receipt["complete"]) == (1, True)

        await asyncio.gather(
            *(come(user_id, token) for (user_id, _), token in zip(users, tokens, strict=True))
        )
        assert metrics(p.b).unconfirmed == 0


async def test_a_group_is_left_after_its_last_device_and_found_again(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device() as stays:

        async def subscribed() -> set[str]:
            return {one.decode() for one in await p.redis.pubsub_channels("wsgateway:group:*")}

        async def noted() -> set[str]:
            return {one.decode() for one in await p.redis.smembers("wsgateway:groups:b")}

        theirs = {"wsgateway:group:user_2", "wsgateway:group:device_2"}
        for _ in range(2):  # who comes back soon finds his group still there
            async with p.b.device(bob) as device:
                assert theirs < await subscribed()
                await p.send(p.a, 2, "hello")
                assert await received(device) == "hello"
        assert theirs < await subscribed()
        await until(lambda: _none_of(theirs, subscribed), 20, 0.2)
        await until(lambda: _none_of({"user_2", "device_2"}, noted), 5)
        assert "user_1" in await noted()
        await p.send(p.a, 1, "stays")
        assert await received(stays) == "stays"
        _, receipt = await p.send(p.a, 2, "nobody")
        assert (receipt["matched"], receipt["complete"]) == (0, True)
        async with p.b.device(bob) as device:
            await p.send(p.a, 2, "again")
            assert await received(device) == "again"
        assert metrics(p.b).mirror_lost == 0


async def _none_of(wanted: set[str], look: Any) -> bool:
    return not wanted & await look()


async def test_a_device_comes_in_within_its_time_when_redis_is_frozen(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server, redis__subscribe_timeout=0.2) as p:
        await p.redis.client_pause(1500)
        async with asyncio.timeout(5), p.b.device(bob) as device:
            assert metrics(p.b).unconfirmed == 1
            status, receipt = await p.send(p.b, 2, "here", "?timeout=0.1")
            assert (status, receipt["matched"], receipt["complete"]) == (200, 1, False)
            assert await received(device) == "here"


async def test_a_restarted_instance_is_counted_from_its_first_message(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    overrides: dict[str, object] = {"redis__url": redis_server.url}
    async with contextlib.AsyncExitStack() as stack:
        b = await stack.enter_async_context(
            running_gateway(accounts, server__instance="b", **overrides)
        )
        device = await stack.enter_async_context(b.device())
        for life in range(3):
            async with running_gateway(accounts, server__instance="a", **overrides) as a:
                gateway = a.running.instance.gateway
                for number in range(5):
                    gateway.to_user(1, {"type": "t", "message": [life, number]})
                for number in range(5):
                    assert await received(device) == [life, number]
        assert (metrics(b).mirror_received, metrics(b).mirror_lost) == (15, 0)
