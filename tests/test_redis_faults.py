"""Whatever becomes of Redis: it is counted to the message, said honestly, and over when Redis is back.

Each fault hits two instances under load; afterwards what was sent is what arrived plus what was
counted as lost, no call was answered with anything but 200, 503 or 504, and the loop never stood
still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from websockets.asyncio.client import ClientConnection

from tests.conftest import Accounts, Process, RedisServer, eventually, running_gateway
from tests.test_cluster import SHARED, Pair, backend, bob, metrics, others, pair, received, until
from wsgateway import envelope

__all__ = ["bob"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

RECOVERY = 6 + 3
"""Seconds within which everything works again once Redis does, with slack."""

QUIET = 2.0
"""The longest silence of the loop: a second is promised, the rest is slack for a busy machine."""


@contextlib.asynccontextmanager
async def ticking() -> AsyncIterator[None]:
    """While inside, the loop gives everybody a turn all the time."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
    assert longest < QUIET


class Traffic:
    """Messages to user 1 through both instances, and what his device on each of them gets."""

    def __init__(self, p: Pair, devices: dict[str, ClientConnection]) -> None:
        self.p = p
        self.devices = devices
        self.sent: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.got: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}
        self.lies: list[Any] = []
        self.enough = False

    async def read(self, name: str) -> None:
        async for text in self.devices[name]:
            self.got[name].append(tuple(orjson.loads(text)["message"]))

    async def post(self, name: str, query: str = "") -> tuple[int, Any]:
        """The next message of an instance; how the call was answered."""
        number = self.sent[name]
        self.sent[name] += 1
        status, receipt = await self.p.send(getattr(self.p, name), 1, [name, number], query)
        self.statuses[status] += 1
        return status, receipt

    async def send(self, name: str) -> None:
        """One message; its receipt must not claim less than its own device got, nor more."""
        status, receipt = await self.post(name, "?timeout=0.3")
        if status == 200 and receipt["instances"].get(name) != 1:
            self.lies.append(receipt)
        if status == 200 and receipt["complete"] and receipt["matched"] != 2:
            self.lies.append(receipt)

    async def keep_sending(self, name: str, pause: float) -> None:
        while not self.enough:  # a call that is cancelled may never have been made
            await self.send(name)
            await asyncio.sleep(pause)

    async def works(self) -> bool:
        """Whether messages of each instance arrive on both again."""
        for name in ("a", "b"):
            status, receipt = await self.post(name)
            if not (status == 200 and receipt["complete"] and receipt["matched"] == 2):
                return False
        return True

    def missing(self, name: str) -> int:
        """How many of the other instance's messages its device did not get."""
        other = "b" if name == "a" else "a"
        return self.sent[other] - sum(origin == other for origin, _ in self.got[name])

    def accounted(self, name: str) -> bool:
        """Whether what is missing was counted: never mirrored by one, or lost by the other."""
        other = "b" if name == "a" else "a"
        sender, receiver = metrics(getattr(self.p, other)), metrics(getattr(self.p, name))
        fates = sender.mirror_published
        lost = self.missing(name)
        # What may or may not have been taken is settled by its number: arrived, or counted lost.
        return lost == fates["not_sent"] + receiver.mirror_lost

    def in_order(self) -> bool:
        for messages in self.got.values():
            for origin in ("a", "b"):
                numbers = [number for sender, number in messages if sender == origin]
                if numbers != sorted(set(numbers)):
                    return False
        return True


@contextlib.asynccontextmanager
async def traffic(
    accounts: Accounts, server: RedisServer, *, pause: float = 0.02, **overrides: object
) -> AsyncIterator[Traffic]:
    """Two instances under load; on leaving, everything adds up."""
    async with (
        pair(accounts, server, **overrides) as p,
        p.a.device() as first,
        p.b.device() as second,
        ticking(),
    ):
        load = Traffic(p, {"a": first, "b": second})
        await until(load.works)
        tasks = [asyncio.create_task(load.read(name)) for name in ("a", "b")]
        senders = [asyncio.create_task(load.keep_sending(name, pause)) for name in ("a", "b")]
        try:
            await eventually(lambda: min(load.sent.values()) > 20)
            yield load
            await until(load.works, RECOVERY)
            load.enough = True
            await asyncio.wait(senders)
            await eventually(lambda: load.accounted("a") and load.accounted("b"), 12)
        except TimeoutError:
            raise AssertionError(report(load)) from None
        finally:
            for task in (*tasks, *senders):
                task.cancel()
        for name in ("a", "b"):
            assert [n for origin, n in load.got[name] if origin == name] == list(
                range(load.sent[name])
            ), "local delivery never waits for Redis"
        assert load.in_order()
        assert load.lies == []
        assert set(load.statuses) <= {200, 503, 504}


def report(load: Traffic) -> str:
    counts = {
        name: (
            load.missing(name),
            metrics(getattr(load.p, name)).mirror_published,
            metrics(getattr(load.p, name)).mirror_lost,
            metrics(getattr(load.p, name)).redis_states,
        )
        for name in ("a", "b")
    }
    return f"does not add up or does not work: sent {load.sent}, {load.statuses}, {counts}"


async def state(load: Traffic, *wanted: str, of: str = "publisher", seconds: float = 10) -> None:
    """Wait until both instances say that they know."""
    seen: dict[str, set[str]] = {"a": set(), "b": set()}

    def is_known() -> bool:
        for name, states in seen.items():
            states.add(metrics(getattr(load.p, name)).redis_states[of])
        return all(states & set(wanted) for states in seen.values())

    try:
        await eventually(is_known, seconds)
    except TimeoutError:
        raise AssertionError(f"{of}: {seen}, not {wanted}") from None


@contextlib.contextmanager
def admin(server: RedisServer) -> Iterator[Callable[..., Any]]:
    """Commands over a connection that is there already, and is spared."""
    with redis.Redis(port=server.port, single_connection_client=True) as client:
        client.ping()
        yield client.execute_command


def kill_all(call: Callable[..., Any]) -> None:
    call("CLIENT", "KILL", "TYPE", "pubsub")
    call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def test_redis_that_is_shut_down_and_comes_back_after_a_while(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with traffic(accounts, redis_server) as load:
        redis_server.stop()
        await state(load, "unreachable")
        await state(load, "unreachable", of="subscriber")
        await asyncio.sleep(8)
        redis_server.start()
    assert metrics(load.p.b).mirror_interruptions >= 1


async def test_redis_that_is_frozen_with_sends_in_flight(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with traffic(accounts, redis_server) as load:
        redis_server.send_signal(signal.SIGSTOP)
        await state(load, "silent")
        for name in ("a", "b"):
            status, receipt = await load.post(name)
            assert (status, receipt["complete"]) == (200, False)
        redis_server.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("seconds", [1, 6])
async def test_clients_that_are_paused(
    accounts: Accounts, redis_server: RedisServer, seconds: int
) -> None:
    async with traffic(accounts, redis_server) as load:
        redis_server.call("CLIENT", "PAUSE", seconds * 1000)
        if seconds > 2:
            await state(load, "silent")
        await asyncio.sleep(seconds)


async def test_losses_of_subscribers_that_are_killed_are_counted_exactly(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with traffic(accounts, redis_server, pause=0.005) as load:
        for kill in range(1, 6):
            await eventually(lambda kill=kill: min(load.sent.values()) > kill * 110, 30)
            redis_server.call("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: min(load.sent.values()) > 600, 30)
    for instance in (load.p.a, load.p.b):
        assert metrics(instance).mirror_interruptions >= 1


async def test_a_loss_at_the_tail_is_counted_though_nothing_follows(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.a.device() as mine, p.b.device() as theirs:
        await p.send(p.a, 1, 0)
        assert await received(mine) == await received(theirs) == 0
        # Nobody may subscribe for longer than two beats, while publishing works.
        redis_server.call("ACL", "SETUSER", "default", "-subscribe")
        redis_server.call("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: metrics(p.b).redis_states["subscriber"] == "no_permission")
        for number in range(1, 4):
            await p.send(p.a, 1, number, "?timeout=0.1")
            assert await received(mine) == number
        await asyncio.sleep(5)
        redis_server.call("ACL", "SETUSER", "default", "+subscribe")
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: metrics(p.b).mirror_lost == 3, 10 + 3)
        assert metrics(p.b).mirror_lost == 3, metrics(p.b).redis_states
        await p.send(p.a, 1, "end")
        assert await received(theirs) == "end"
        assert metrics(p.b).mirror_lost == 3


async def test_a_group_that_could_not_be_noted_is_noted_soon(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with pair(accounts, redis_server) as p, p.b.device():
        clients = await p.redis.client_list()
        [publisher] = [one["id"] for one in clients if one["name"] == "wsgateway:b:publisher"]
        await p.redis.client_kill_filter(_id=publisher)
        async with p.b.device(bob) as device:
            await p.send(p.a, 2, "now")
            assert await received(device) == "now"

            async def is_matched() -> bool:
                _, receipt = await p.send(p.a, 2, "later")
                return receipt["complete"] and receipt["matched"] == 1

            await until(is_matched, RECOVERY, 0.2)


async def test_a_subscriber_that_is_too_slow_for_redis_counts_what_it_missed(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, ticking():
        counts = metrics(p.b)
        limit = "pubsub 65536 65536 1"
        redis_server.call("CONFIG", "SET", "client-output-buffer-limit", limit)

        def sealed(number: int) -> bytes:
            payload = orjson.dumps({"type": "t", "message": "x" * 10_000})
            return envelope.seal("elsewhere", "e", number, envelope.new_id("q"), payload)

        def flood() -> None:
            with redis.Redis(port=redis_server.port) as client:
                pipe = client.pipeline(transaction=True)  # at once, faster than anybody reads
                for number in range(2, 1001):
                    pipe.publish("wsgateway:all", sealed(number))
                pipe.execute()

        await p.redis.publish("wsgateway:all", sealed(1))
        await eventually(lambda: counts.mirror_received == 1)
        await asyncio.to_thread(flood)
        await eventually(lambda: counts.mirror_interruptions == 1)
        await eventually(lambda: counts.redis_states["subscriber"] == "up", RECOVERY)
        beat = envelope.seal_beat("elsewhere", {"wsgateway:all": ("e", 1000)})
        await p.redis.publish("wsgateway:all", beat)
        await eventually(lambda: counts.mirror_received + counts.mirror_lost == 1000)
        assert counts.mirror_lost > 0


async def test_redis_that_forgets_everything_makes_no_receipt_lie(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with traffic(accounts, redis_server) as load:
        for _ in range(3):
            redis_server.call("FLUSHALL")
            await until(load.works, RECOVERY)
    assert metrics(load.p.a).mirror_lost == metrics(load.p.b).mirror_lost == 0


async def test_redis_that_takes_no_more_clients(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    with admin(redis_server) as call:
        async with traffic(accounts, redis_server) as load:
            call("CONFIG", "SET", "maxclients", 1)
            kill_all(call)
            await state(load, "max_clients")
            await state(load, "max_clients", of="subscriber")
            call("CONFIG", "SET", "maxclients", 1000)


async def test_redis_that_wants_a_password(accounts: Accounts, redis_server: RedisServer) -> None:
    with admin(redis_server) as call:
        async with traffic(accounts, redis_server) as load:
            call("CONFIG", "SET", "requirepass", "secret")
            kill_all(call)
            await state(load, "no_auth")
            await state(load, "no_auth", of="subscriber")
            call("CONFIG", "SET", "requirepass", "")


async def test_redis_that_loads_its_data(accounts: Accounts, redis_server: RedisServer) -> None:
    redis_server.call("MSET", *(word for n in range(400) for word in (f"k{n}", n)))
    redis_server.call("SAVE")
    async with traffic(accounts, redis_server) as load:
        redis_server.stop(signal.SIGKILL)
        redis_server.options = [
            "--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024",
        ]  # fmt: skip
        redis_server.start()
        await state(load, "loading")
        await until(lambda: _loaded(redis_server), 20, 0.2)


async def _loaded(server: RedisServer) -> bool:
    with contextlib.suppress(redis.RedisError):
        return await asyncio.to_thread(server.call, "PING", timeout=1) in (True, b"PONG")
    return False


async def test_redis_without_memory_mirrors_on_and_forgets_no_group(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with traffic(accounts, redis_server) as load:
        await state(load, "up", of="presence")
        redis_server.call("CONFIG", "SET", "maxmemory", 1)
        await state(load, "out_of_memory", of="presence")
        async with load.p.b.device(bob) as device:  # its group cannot be noted
            await load.p.send(load.p.a, 2, "now")
            assert await received(device) == "now"
            redis_server.call("CONFIG", "SET", "maxmemory", 0)

            async def is_complete() -> bool:
                _, receipt = await load.p.send(load.p.a, 2, "later")
                return receipt["complete"] and receipt["matched"] == 1

            await until(is_complete, RECOVERY)
        await state(load, "up", of="presence")


async def test_redis_that_became_a_replica(accounts: Accounts, redis_server: RedisServer) -> None:
    async with traffic(accounts, redis_server) as load:
        redis_server.call("REPLICAOF", "127.0.0.1", 1)
        await state(load, "read_only")
        redis_server.call("REPLICAOF", "NO", "ONE")


async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
    writer.close()


async def test_something_else_that_answers_on_its_port(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with traffic(accounts, redis_server) as load:
        redis_server.stop()
        server = await asyncio.start_server(nonsense, "127.0.0.1", redis_server.port)
        async with server:
            await state(load, "garbage")
            await state(load, "garbage", of="subscriber")
        redis_server.start()


async def test_redis_that_is_away_at_the_start_keeps_nobody_out(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    redis_server.stop()
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, server__instance="a", **overrides) as a,
        running_gateway(accounts, server__instance="b", **overrides) as b,
        a.device(max_queue=None) as device,
        b.device(max_queue=None) as other,
    ):
        p = make(a, b)
        status, receipt = await p.send(a, 1, "here")
        assert (status, receipt["instances"], receipt["complete"]) == (200, {"a": 1}, False)
        assert await received(device) == "here"
        user_id, _ = await accounts.add_user("nobody here")
        status, answer = await p.send(a, user_id, "away")
        assert (status, answer["code"], answer["message"]) == (503, "unavailable", "消息发送失败")
        for method in ("GET", "DELETE"):
            assert (await p.call(a, method, "/api/queue"))[0] == 503
        redis_server.start()

        async def works() -> bool:
            _, receipt = await p.send(a, 1, "again")
            return receipt["complete"] and receipt["matched"] == 2

        await until(works, RECOVERY)
        assert await received(other) == "again"


@pytest.mark.parametrize(
    ("required", "status"), [(True, (503, "unavailable")), (False, (200, "degraded"))]
)
async def test_readiness_says_when_the_probe_does_not_come_back(
    accounts: Accounts, redis_server: RedisServer, required: bool, status: tuple[int, str]
) -> None:
    async with pair(accounts, redis_server, redis__required=required) as p:

        async def says(*wanted: object) -> bool:
            async with p.http.get(p.a.api_url + "/readyz") as response:
                return (response.status, (await response.json())["status"]) == wanted

        await until(lambda: says(200, "ok"))
        redis_server.send_signal(signal.SIGSTOP)
        await until(lambda: says(*status), 10 + 3)
        redis_server.send_signal(signal.SIGCONT)
        await until(lambda: says(200, "ok"), RECOVERY)


async def test_five_thousand_messages_from_each_of_two_reach_everybody_once_in_order(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, contextlib.AsyncExitStack() as stack, ticking():
        devices = [
            await stack.enter_async_context(instance.device(max_queue=None))
            for instance in (p.a, p.b)
            for _ in range(2)
        ]

        async def read(device: ClientConnection) -> list[Any]:
            return [await received(device, 30) for _ in range(10_000)]

        async def send(name: str) -> None:
            for start in range(0, 5000, 500):
                batch = [
                    {"type": "t", "message": [name, number], "user_id": 1}
                    for number in range(start, start + 500)
                ]
                instance = getattr(p, name)
                path = "/api/messages/batch?timeout=10"
                status, answer = await p.call(instance, "POST", path, batch)
                assert status == 200
                for result in answer["data"]["results"]:
                    assert (result["delivery"]["matched"], result["delivery"]["complete"]) == (
                        4,
                        True,
                    )

        *got, _, _ = await asyncio.gather(*map(read, devices), send("a"), send("b"))
        for messages in got:
            for name in ("a", "b"):
                numbers = [number for origin, number in messages if origin == name]
                assert numbers == list(range(5000))


async def test_an_instance_killed_with_items_in_hand_loses_none_and_repeats_one_at_most(
    accounts: Accounts, redis_server: RedisServer, serve: Callable[..., Process]
) -> None:
    holder = await asyncio.to_thread(
        serve,
        WSGATEWAY_AUTH_DATABASE=str(accounts.path),
        WSGATEWAY_REDIS_URL=redis_server.url,
        WSGATEWAY_SERVER_INSTANCE="holder",
    )
    overrides: dict[str, object] = {"redis__url": redis_server.url, **SHARED}
    async with (
        backend(redis_server) as make,
        running_gateway(accounts, server__instance="heir", **overrides) as heir,
        heir.device() as device,
    ):
        p = make(heir, heir)
        await eventually(lambda: others(heir) == ["holder"])
        async with p.redis.pipeline(transaction=False) as pipe:
            for number in range(2000):
                message = {"user_id": 1, "message": {"type": "t", "message": number}}
                pipe.lpush("device_messages", orjson.dumps(message))
            await pipe.execute()
        got = [await received(device, 20) for _ in range(100)]
        holder.stop(signal.SIGKILL)
        while got[-1] != 1999:
            got.append(await received(device, 10 + 3 + 5))
        assert [number for n, number in enumerate(got) if number not in got[:n]] == [*range(2000)]
        assert len(got) <= 2001
        await eventually(lambda: metrics(heir).queue_items["put_back"] <= 1)


class Namespace:
    """A network namespace with a link that can be cut without anybody being told."""

    def __init__(self) -> None:
        number = os.getpid() % 16_000
        self.name = f"wsg{number}"
        self._net = f"10.{128 + number // 250}.{number % 250}"
        self.address = f"{self._net}.2"

    def run(self, words: str) -> None:
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        done = subprocess.run([*sudo, *words.split()], capture_output=True, timeout=10)
        assert done.returncode == 0, (words, done.stderr)

    def open(self) -> None:
        name, net = self.name, self._net
        self.run(f"ip netns add {name}")
        self.run(f"ip link add {name}o type veth peer name {name}i netns {name}")
        self.run(f"ip addr add {net}.1/24 dev {name}o")
        self.run(f"ip link set {name}o up")
        self.run(f"ip -n {name} addr add {net}.2/24 dev {name}i")
        self.run(f"ip -n {name} link set {name}i up")

    def cut(self) -> None:
        """The other end throws away what comes and what goes; no connection is told."""
        self.run(f"ip -n {self.name} route add blackhole {self._net}.1/32")

    def mend(self) -> None:
        self.run(f"ip -n {self.name} route del blackhole {self._net}.1/32")

    def close(self) -> None:
        with contextlib.suppress(AssertionError):  # it may not have come into being
            self.run(f"ip link del {self.name}o")
        self.run(f"ip netns del {self.name}")


class DistantRedis(RedisServer):
    """A redis-server at the other end of a link."""

    def __init__(self, folder: Path, namespace: Namespace) -> None:
        super().__init__(folder)
        self._namespace = namespace

    @property
    def url(self) -> str:
        return f"redis://{self._namespace.address}:{self.port}/0"

    def start(self) -> None:
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        self._process = subprocess.Popen(
            [*sudo, "ip", "netns", "exec", self._namespace.name, "redis-server",
             "--port", str(self.port), "--bind", self._namespace.address, "--save", "",
             "--protected-mode", "no", "--dir", str(self.folder), "--logfile", "redis.log"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(100):
            with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.url) as client:
                client.ping()
                return
            time.sleep(0.05)
        raise AssertionError("redis-server does not start")


@pytest.fixture
def distant(tmp_path: Path) -> Iterator[tuple[DistantRedis, Namespace]]:
    namespace = Namespace()
    server = DistantRedis(tmp_path / "redis", namespace)
    try:
        namespace.open()
        server.start()
        yield server, namespace
    finally:
        server.stop(signal.SIGKILL)
        namespace.close()


async def test_a_link_that_swallows_everything(
    accounts: Accounts, distant: tuple[DistantRedis, Namespace]
) -> None:
    server, namespace = distant
    async with traffic(accounts, server) as load:
        namespace.cut()
        await state(load, "silent")
        await asyncio.sleep(12)  # longer than the kernel's own deadlines
        namespace.mend()


async def test_a_queue_waits_while_redis_lets_nothing_be_published(
    accounts: Accounts, redis_server: RedisServer, bob: str
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.a.device(bob) as first,
        p.b.device(bob) as second,
    ):
        with admin(redis_server) as call:
            call("ACL", "SETUSER", "default", "-publish")
            await eventually(lambda: metrics(p.a).redis_states["publisher"] == "no_permission")
            for number in range(20):
                message = {"user_id": 2, "message": {"type": "t", "message": number}}
                call("LPUSH", "device_messages", orjson.dumps(message))
            await asyncio.sleep(12)  # longer than a lease
            call("ACL", "SETUSER", "default", "+publish")
        for device in (first, second):
            assert [await received(device, 20) for _ in range(20)] == list(range(20))

        def is_done() -> bool:
            return metrics(p.a).queue_items + metrics(p.b).queue_items == {"sent": 20}

        await eventually(is_done)

        async def is_complete() -> bool:
            status, receipt = await p.send(p.a, 2, "end")
            return status == 200 and bool(receipt["complete"])

        await until(is_complete, RECOVERY)
        for device in (first, second):
            assert await received(device) == "end", "none came twice"


async def test_calls_about_all_instances_are_complete_only_while_all_can_be_asked(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with pair(accounts, redis_server) as p, p.a.device(), p.b.device():

        async def look() -> tuple[int, bool]:
            about = await p.data(p.a, "GET", "/api/connections")
            return len(about["connections"]), about["complete"]

        assert await look() == (2, True)
        redis_server.stop(signal.SIGKILL)
        await eventually(lambda: others(p.a) == [], 20)
        assert await look() == (1, False)
        cut = await p.data(p.a, "POST", "/api/users/1/disconnect", {})
        assert (cut["cut"], cut["complete"]) == (1, False)
        redis_server.start()

        async def is_complete() -> bool:
            return await look() == (1, True)

        await until(is_complete, RECOVERY)
