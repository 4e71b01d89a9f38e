"""A reload: what is found good is in use at once, what is not changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_origin

import msgspec
import orjson
import pytest
from aiohttp import ClientSession, web
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from tests.conftest import (
    Accounts,
    Instance,
    Process,
    RedisServer,
    ask,
    eventually,
    loaded,
    running_gateway,
)
from tests.services import Fake, chat_flags, completion, openai, qweather, weather_flags
from wsgateway import config
from wsgateway.config import Config, Key, Loaded
from wsgateway.errors import ConfigError, Conflict
from wsgateway.metrics import Metrics
from wsgateway.reload import Apply, Changes, Reloader

Serve = Callable[..., Process]
Cli = Callable[..., subprocess.CompletedProcess[str]]

PING = {"type": "ping"}


# Every key.


LITERALS = {
    "runtime.loop": "asyncio", "tls.minimum_version": "1.3",
    "auth.refuse": "close", "limits.duplicate": "newest", "weather.api": "v1",
    "chat.max_tokens_field": "max_completion_tokens", "log.level": "debug", "log.format": "json",
}  # fmt: skip
OTHERS = {
    "auth.origins": (["https://old.example"], ["https://new.example"]),
    "api.keys": ([], [{"name": "new", "sha256": "a" * 64}]),
    "limits.connections": (331, 337),
    "compression.level": (1, 2),
    "compression.window_bits": (12, 13),
    "limits.descriptor_reserve": (131, 137),
    "handlers.timeout": (50.0007, 50.0011),
    "weather.timeout": (3.0007, 3.0011),
    "weather.url": ("https://old.example", "https://new.example"),
    "server.port": (0, 1),
    "server.trusted_proxies": ([], ["10.0.0.0/8"]),
    "api.port": (0, 1),
    "handlers.modules": ([], ["tests.test_device_socket"]),
    "redis.url": ("", "redis://elsewhere:1/0"),
    "chat.url": ("https://old.example/v1", "https://new.example/v1"),
}
FIXED = ("weather.provider", "chat.provider", "weather.jwt_key")
"""Live keys that this test leaves alone: both services are real ones, with a key."""


def values_of(key: Key, number: int) -> tuple[object, object]:
    """Two values of a key that no other key has, and nothing else."""
    if key.path in OTHERS:
        return OTHERS[key.path]
    if get_origin(key.type) is not None:
        return key.default, LITERALS[key.path]
    if key.type is bool:
        return key.default, not key.default
    if key.type is str:
        return f"old-{number}", f"new-{number}"
    if key.type is float:
        return 1.0137 + number / 1000, 1.5137 + number / 1000
    return 1_000_003 + 2 * number, 2_000_003 + 2 * number


def held_by(root: object) -> tuple[set[object], list[msgspec.Struct]]:
    """The numbers and texts, and the sections, that parts of the gateway hold."""
    values, sections, seen, stack = set[object](), list[msgspec.Struct](), set[int](), [root]
    while stack:
        one: Any = stack.pop()
        if isinstance(one, int | float | str):
            values.add(one)
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            stack += one
        elif isinstance(one, msgspec.Struct):
            sections.append(one)
            stack += msgspec.structs.astuple(one)
        elif callable(one) and hasattr(one, "__self__"):
            stack.append(one.__self__)
        elif callable(one) and hasattr(one, "__closure__"):
            stack += [cell.cell_contents for cell in one.__closure__ or ()]
        elif type(one).__module__.startswith("wsgateway"):
            names = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(one, name) for name in names if hasattr(one, name)]
            stack.append(getattr(one, "__dict__", {}))
    return values, sections


def test_the_live_keys_are_keys() -> None:
    live = {f"{section}.{name}" for section, names in config.LIVE.items() for name in names.split()}
    assert live <= config.keys().keys()


async def test_after_a_reload_no_part_goes_by_an_old_value(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    live = [key for key in config.keys().values() if key.live and key.path not in FIXED]
    pairs = {key: values_of(key, number) for number, key in enumerate(live)}
    old, new = (
        {key.path.replace(".", "__"): pair[side] for key, pair in pairs.items()} for side in (0, 1)
    )
    fixed = {"weather__provider": "qweather", "chat__provider": "openai"}
    async with running_gateway(accounts, redis__url=redis_server.url, **fixed, **old) as gateway:
        distinct = {
            old for old, _ in pairs.values() if type(old) in (int, float)
            or (isinstance(old, str) and old.startswith("old-"))
        }  # fmt: skip
        assert len(distinct) > 60
        assert distinct & held_by(gateway.running)[0] > {50.0007, 331}
        changes = await gateway.reload(**new)
        assert changes == Changes(tuple(key.path for key in live), ())
        values, sections = held_by(gateway.running)
        assert distinct & values == set()
        wanted = loaded(accounts, gateway.overrides).config
        found = {type(section) for section in sections}
        assert {config.Auth, config.Limits, config.Api, config.Weather, config.Chat} <= found
        for section in sections:
            if isinstance(section, config.Section) and not isinstance(
                section, Config | config.ApiKey
            ):
                assert section == getattr(wanted, type(section).__name__.lower())


async def test_what_needs_a_restart_is_named_at_each_reload_and_stays_as_it_was(
    accounts: Accounts,
) -> None:
    keys = [key for key in config.keys().values() if not key.live]
    changes = {
        key.path.replace(".", "__"): values_of(key, number)[1] for number, key in enumerate(keys)
    }
    restart = tuple(key.path for key in keys)
    unused = {"tls__certificate": "unused.pem"}  # without one, TLS could not be wanted
    async with running_gateway(accounts, **unused) as gateway, gateway.device() as device:
        assert await gateway.reload(**changes) == Changes((), restart)
        assert await gateway.reload(limits__messages=50) == Changes(("limits.messages",), restart)
        assert (await ask(device, PING))["type"] == "pong"
        async with gateway.device():
            pass
        for name in changes:
            del gateway.overrides[name]
        assert await gateway.reload(limits__messages=60) == Changes(("limits.messages",), ())


# What devices notice.


async def pings(device: ClientConnection) -> int:
    """Ping until the gateway ends the connection; how many were answered."""
    answered = 0
    with contextlib.suppress(ConnectionClosedError):
        while (await ask(device, PING))["type"] == "pong":
            answered += 1
        await device.recv()
    return answered


@pytest.mark.parametrize(("before", "after"), [(10, 20), (20, 10)])
async def test_connected_devices_begin_a_window_of_the_new_length(
    accounts: Accounts, before: int, after: int
) -> None:
    async with running_gateway(accounts, limits__messages=before) as gateway:
        async with gateway.device() as device:
            for _ in range(before - 1):
                assert (await ask(device, PING))["type"] == "pong"
            await gateway.reload(auth__cache_ttl=1)
            await gateway.reload(limits__messages=after)
            assert await pings(device) == after
            assert device.close_code == 4008
        with pytest.raises(InvalidStatus):  # what it sent since then is remembered
            async with gateway.device():
                pass
        await gateway.reload(limits__window=59)
        async with gateway.device() as device:
            assert await pings(device) == after


async def test_a_reload_that_changes_no_window_forgives_nothing(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__messages=5) as gateway, gateway.device() as device:
        for _ in range(3):
            await ask(device, PING)
        await gateway.reload(limits__remembered_windows=5)
        assert await pings(device) == 2


async def test_connected_devices_go_by_new_sizes_and_counts(accounts: Accounts) -> None:
    async with running_gateway(accounts) as gateway, gateway.device() as device:
        await gateway.reload(limits__message_characters=50, limits__connections_per_user=1)
        answer = await ask(device, {"type": "ping", "message": "x" * 60})
        assert answer["code"] == "MESSAGE_TOO_LARGE"
        with pytest.raises(InvalidStatus, match="503"):
            async with gateway.device():
                pass
        await gateway.reload(limits__connections_per_user=2, limits__connections=1)
        with pytest.raises(InvalidStatus, match="503"):
            async with gateway.device():
                pass
        await gateway.reload(limits__connections=0, limits__message_bytes=60)
        await device.send("x" * 61)
        with pytest.raises(ConnectionClosedError):
            await device.recv()
        assert device.close_code == 1009


async def test_a_new_list_of_origins_is_for_who_comes(gateway: Instance) -> None:
    async with gateway.device(origin="https://a.example") as device:
        await gateway.reload(auth__origins=["https://b.example"])
        with pytest.raises(InvalidStatus, match="403"):
            async with gateway.device(origin="https://a.example"):
                pass
        async with gateway.device(origin="https://b.example"), gateway.device():
            pass
        assert (await ask(device, PING))["type"] == "pong"
        await gateway.reload(auth__require_origin=True, auth__refuse="close")
        with pytest.raises(InvalidStatus, match="403"):
            async with gateway.device():
                pass


async def test_remembered_tokens_are_forgotten(accounts: Accounts) -> None:
    async with running_gateway(accounts, auth__cache_ttl=60, auth__poll_interval=5) as gateway:
        lookups = gateway.running.instance.metrics.lookups
        for _ in range(2):
            async with gateway.device():
                pass
        assert (lookups["database"], lookups["cache"]) == (1, 1)
        await gateway.reload()
        async with gateway.device():
            pass
        assert (lookups["database"], lookups["cache"]) == (2, 1)


@pytest.mark.parametrize(("before", "after"), [(300, 0.2), (0.3, 0.2)])
async def test_a_silent_device_is_found_in_the_new_time(
    accounts: Accounts, before: float, after: float
) -> None:
    times = {"keepalive__interval": before, "keepalive__timeout": max(before, 60)}
    async with running_gateway(accounts, **times) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            f"GET /ws/device/?token={gateway.token} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        async with gateway.device() as device:  # one that answers stays
            await gateway.reload(keepalive__interval=after, keepalive__timeout=after)
            async with asyncio.timeout(20):
                await reader.read()
            assert (await ask(device, PING))["type"] == "pong"
        writer.close()
        assert gateway.running.instance.metrics.closed["1011"] == 1


# Services.


@pytest.fixture
async def chat() -> AsyncIterator[Fake]:
    async with Fake(openai).running() as fake:
        yield fake


async def test_devices_talk_to_the_new_services(accounts: Accounts, chat: Fake) -> None:
    async with (
        Fake(qweather).running() as weather,
        running_gateway(accounts) as gateway,
        gateway.device() as device,
    ):
        message = {"type": "chat_message", "message": "hi"}
        assert "heard hi" not in (await ask(device, message))["message"]
        changes = await gateway.reload(**chat_flags(chat), **weather_flags(weather))
        assert "chat.provider" in changes.applied
        assert (await ask(device, message))["message"] == "heard hi"
        data = (await ask(device, {"type": "weather", "message": {"city": "上海"}}))["data"]
        assert data["weather"]["now"]["text"] == "多云"
        await gateway.reload(chat__provider="echo")
        assert "heard hi" not in (await ask(device, message))["message"]


async def test_a_question_under_way_is_answered_by_whom_it_was_asked(
    accounts: Accounts, chat: Fake
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(request: web.Request) -> web.StreamResponse:
        asked.set()
        await go_on.wait()
        return await completion("the old one")(request)

    message = {"type": "chat_message", "message": "hi"}
    async with (
        Fake(openai).running() as other,
        running_gateway(accounts, **chat_flags(chat)) as gateway,
        gateway.device() as waiting,
        gateway.device() as device,
    ):
        chat.good = slowly
        await waiting.send(orjson.dumps(message).decode())
        await asked.wait()
        await gateway.reload(chat__url=f"{other.url}/v1/")
        assert (await ask(device, message))["message"] == "heard hi"
        go_on.set()
        assert orjson.loads(await waiting.recv())["message"] == "the old one"


async def test_services_that_were_replaced_are_bounded_and_end(
    accounts: Accounts, chat: Fake
) -> None:
    flags = chat_flags(chat, chat__timeout=0.3, handlers__timeout=0.4)
    async with running_gateway(accounts, **flags) as gateway, gateway.device() as device:
        chat.good = chat.hang
        changeover = gateway.running.instance.changeover
        for number in range(8):
            await gateway.reload(chat__model=f"model {number}")
            assert len(changeover._tasks) <= 6
        await eventually(lambda: len(changeover._tasks) == 1)
        chat.good = openai
        answer = await ask(device, {"type": "chat_message", "message": "hi"})
        assert answer["message"] == "heard hi"
    assert not changeover._tasks


# Refused.


BAD = {
    "a value": ({"limits__messages": "many"}, "limits.messages = 'many'"),
    "two values": ({"limits__message_bytes": 100}, "limits.message_bytes = 100: must be at least"),
    "no such key": ({"limits__mesages": 1}, "did you mean limits.messages?"),
    "no key": ({"weather__provider": "qweather", "weather__url": "https://a.example"}, "weather.key"),
    "a key that is none": (
        {"weather__provider": "qweather", "weather__url": "https://a.example", "weather__jwt_id": "a",
         "weather__jwt_project": "a", "weather__jwt_key": "-----BEGIN PRIVATE KEY-----"},
        "weather.jwt_key",
    ),
    "no such module": ({"handlers__modules": ["nowhere"]}, "'nowhere' cannot be imported"),
    "a module that fails": ({"handlers__modules": ["tests.broken_handlers"]}, "handlers.modules"),
    "too many": ({"limits__connections": 2**31 - 1}, "fit under the descriptor limit"),
    "a token": ({"limits__messages": "wsg_" + "a" * 43}, "limits.messages = '***'"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
async def test_what_cannot_be_used_is_one_line_and_changes_nothing(
    accounts: Accounts, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, line = BAD[bad]
    async with running_gateway(accounts) as gateway, gateway.device() as device:
        before = held_by(gateway.running)[1]
        with pytest.raises(ConfigError) as refused:
            await gateway.reload(limits__window=5, **changes)
        assert line in str(refused.value)
        assert str(refused.value).isprintable()
        (record,) = [one for one in caplog.records if one.name == "wsgateway.reload"]
        assert record.getMessage() == (
            f"reload refused, the configuration stays as it was: {refused.value}"
        )
        assert held_by(gateway.running)[1] == before
        metrics = gateway.running.instance.metrics
        assert (metrics.reloads, metrics.reloaded_at) == ({"refused": 1}, 0)
        assert (await ask(device, PING))["type"] == "pong"
        for name in changes:
            del gateway.overrides[name]
        assert (await gateway.reload()).applied == ("limits.window",)
        assert metrics.reloads == {"refused": 1, "applied": 1}
        assert abs(time.time() - metrics.reloaded_at) < 60


# Order.


class Reading:
    """Reads a configuration when it is allowed to."""

    def __init__(self, found: Config) -> None:
        self.found = found
        self.times = 0
        self.allowed = threading.Event()

    def __call__(self) -> Loaded:
        self.times += 1
        self.allowed.wait(20)
        return Loaded(self.found, {}, None, ())


async def test_reloads_happen_one_after_the_other_and_those_asked_for_meanwhile_are_one() -> None:
    reading, metrics, inside = Reading(Config()), Metrics(), []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    reloader = Reloader(Config(), reading, metrics, around)
    async with reloader.open():
        first = asyncio.create_task(reloader.reload())
        await eventually(lambda: reading.times == 1)
        others = [asyncio.create_task(reloader.reload()) for _ in range(20)]
        reloader.wish()
        for impatient in others[:10]:
            impatient.cancel()  # changes nothing for the others
        reading.allowed.set()
        assert await first == Changes((), ())
        await asyncio.gather(*others[10:])
    assert reading.times == metrics.reloads["applied"] == 2
    assert inside == ["in", "out"] * 2


async def test_nothing_is_reloaded_while_the_gateway_starts_or_stops() -> None:
    reading = Reading(Config())
    reloader = Reloader(Config(), reading, Metrics())
    with pytest.raises(Conflict, match="starting or stopping"):
        await reloader.reload()
    reloader.wish()
    async with reloader.open():
        waiting = asyncio.create_task(reloader.reload())
        await eventually(lambda: reading.times)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(Conflict, match="starting or stopping"):
        await reloader.reload()
    reloader.wish()
    assert reading.times == 1
    reading.allowed.set()


async def test_files_that_never_end_hold_one_thread_and_nothing_else() -> None:
    reading, metrics = Reading(Config()), Metrics()
    reloader = Reloader(Config(), reading, metrics, read_seconds=0.1)
    async with reloader.open():
        with pytest.raises(ConfigError, match=r"could not be read within 0\.1 s"):
            await reloader.reload()
        for _ in range(3):
            with pytest.raises(ConfigError, match="still being read"):
                await reloader.reload()
        assert reading.times == 1
        reading.allowed.set()
        async with asyncio.timeout(10):
            while metrics.reloads["applied"] == 0:
                with contextlib.suppress(ConfigError):
                    await reloader.reload()


async def test_nothing_changes_before_everything_was_prepared() -> None:
    done: list[str] = []
    faults = ["certificate: does not match its key"]

    def prepare_well(running: Config, wanted: Config) -> Apply:
        assert threading.current_thread() is not threading.main_thread()
        assert (running.limits.messages, wanted.limits.messages) == (100, 5)

        async def apply() -> None:
            done.append("certificate")

        return apply

    def prepare_badly(running: Config, wanted: Config) -> None:
        if faults:
            raise ConfigError(faults.pop())

    wanted = Config(limits=config.Limits(messages=5))
    reading = Reading(wanted)
    reading.allowed.set()
    reloader = Reloader(Config(), reading, Metrics())
    reloader.parts.append(lambda config: done.append(f"messages {config.limits.messages}"))
    reloader.prepares += [prepare_well, prepare_badly]
    async with reloader.open():
        with pytest.raises(ConfigError, match="does not match"):
            await reloader.reload()
        assert done == []
        assert await reloader.reload() == Changes(("limits.messages",), ())
    assert done == ["messages 5", "certificate"]


# Over HTTP.


def key_flags(*keys: str) -> dict[str, object]:
    """The configuration of these keys, all of scope admin but the last."""
    rows = [
        {"name": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scope": "admin"}
        for key in keys
    ]
    rows[-1]["scope"] = "api"
    return {"api__keys": rows}


async def test_the_api_reloads_and_says_what_changed(accounts: Accounts) -> None:
    async with (
        running_gateway(accounts, **key_flags("old", "backend")) as gateway,
        ClientSession(gateway.api_url) as session,
    ):

        async def reload(key: str) -> tuple[int, Any]:
            async with session.post("/api/reload", headers={"X-API-Key": key}) as answer:
                body = await answer.json()
                return answer.status, body.get("data") or (body["code"], body["message"])

        assert await reload("old") == (200, {"applied": [], "restart": []})
        assert (await reload("backend"))[0] == 403
        gateway.overrides |= key_flags("new", "backend") | {"server__port": 5}
        changed = {"applied": ["api.keys"], "restart": ["server.port"]}
        assert await reload("old") == (200, changed)
        assert (await reload("old"))[0] == 401
        gateway.overrides["limits__messages"] = 0
        line = "command line: limits.messages = 0: must be a whole number, at least 1"
        assert await reload("new") == (422, ("configuration", line))
        async with session.get("/metrics") as answer:
            text = await answer.text()
        for result, times in (("applied", 2), ("refused", 1)):
            row = rf'wsgateway_reloads_total{{instance_name="here",result="{result}"}} {times}\.0'
            assert re.search(row, text)


async def test_the_api_goes_by_new_limits(accounts: Accounts) -> None:
    key = await accounts.add_token(scope="admin")
    async with (
        running_gateway(accounts, api__body_bytes=100) as gateway,
        ClientSession(gateway.api_url, headers={"X-API-Key": key}) as session,
    ):

        async def broadcast(length: int) -> int:
            body = {"message": "x" * length}
            async with session.post("/api/broadcast", json=body) as answer:
                return answer.status

        assert await broadcast(200) == 413
        await gateway.reload(api__body_bytes=2 << 20)
        assert await broadcast(200) == 200
        assert await broadcast(70_000) == 413
        await gateway.reload(limits__message_bytes=80_000)
        assert await broadcast(70_000) == 200


# As a process.


@pytest.fixture
def file(tmp_path: Path, cli: Cli) -> Path:
    """A configuration file whose database holds a user, with a key of scope admin beside it."""
    path = tmp_path / "gateway.toml"
    path.write_text(CONFIG)
    for words in (("db", "init"), ("user", "add", "alice")):
        assert cli(*words, "--config", str(path)).returncode == 0
    token = ("token", "create", "--user", "1", "--quiet", "--config", str(path))
    (tmp_path / "key").write_text(cli(*token, "--scope", "admin").stdout)
    return path


CONFIG = """
[server]
host = "127.0.0.1"
[auth]
database = "wsgateway.db"
"""


def wait_for(gateway: Process, text: str, times: int = 1) -> str:
    """The log, once it holds a text so often."""
    end = time.monotonic() + 20
    while time.monotonic() < end and gateway.popen.poll() is None:
        log = gateway.log.read_text()
        if log.count(text) >= times:
            return log
    raise AssertionError(f"{text!r} is not in {gateway.log.read_text()}")


def test_a_signal_reloads_the_file_the_environment_and_the_flags(
    file: Path, serve: Serve, cli: Cli, loop: str
) -> None:
    gateway = serve("--config", str(file), "--loop", loop, "--set", "limits.messages=7")
    file.write_text(
        CONFIG + '[limits]\nmessages = 9\n[log]\nformat = "json"\n[redis]\nprefix = "x"\n'
    )
    gateway.popen.send_signal(signal.SIGHUP)
    log = wait_for(gateway, "needs a restart")
    first, second = map(orjson.loads, log.splitlines()[-2:])
    assert first["message"] == "reloaded applied=log.format"
    assert second["message"] == "reload: needs a restart: redis.prefix"
    assert second["level"] == "warning"
    file.write_text(CONFIG + '[log]\nlevel = "error"\n')
    url = f"http://127.0.0.1:{gateway.api_port}"
    done = cli("reload", "--url", url, "--key-file", "key", "--quiet")
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert gateway.stop() == 0
    assert gateway.log.read_text() == log


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_garbage_in_any_form_is_one_line_and_the_gateway_goes_on(
    file: Path, serve: Serve, cli: Cli, tmp_path: Path
) -> None:
    gateway = serve("--config", str(file))
    started = len(gateway.log.read_text().splitlines())
    url = f"http://127.0.0.1:{gateway.api_port}"
    (tmp_path / "config.toml").write_text("[limits]\nmessages = 5\n")  # not the file it began with
    secret = "[weather]\nprovider = 'qweather'\nurl = 'https://a.example'\nkey_file = 'gone'\n"
    garbage: list[tuple[bytes | None, str]] = [
        (b"\x00\xff", "not valid TOML"), (b"[limits\n", "not valid TOML"), (b"[" * 9999, "TOML"),
        (b"[limits]\nmessages = 'x'\n", "gateway.toml:2: limits.messages = 'x'"),
        (secret.encode(), "gone cannot be read"), (None, "no such configuration file"),
    ]  # fmt: skip
    for number, (content, line) in enumerate(garbage, 1):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        if number % 2:
            gateway.popen.send_signal(signal.SIGHUP)
        else:
            done = cli("reload", "--url", url, "--key-file", "key")
            assert (done.returncode, done.stdout) == (1, "")
            assert line in done.stderr
            assert done.stderr.endswith(" [422 configuration]\n")
        assert line in wait_for(gateway, "reload refused", number).splitlines()[-1]
        file.touch()
    assert len(gateway.log.read_text().splitlines()) == started + len(garbage)
    file.unlink()
    file.mkdir()
    assert cli("reload", "--url", url, "--key-file", "key").returncode == 1
    file.rmdir()
    file.write_text(CONFIG + "[limits]\nmessages = 5\n[queue]\nname = 'other'\n")
    done = cli("reload", "--url", url, "--key-file", "key")
    assert (done.returncode, done.stdout) == (
        0, "applied: limits.messages\nneeds a restart: queue.name\n"
    )  # fmt: skip
    done = cli("reload", "--url", url, "--key-file", "key", "--json")
    assert orjson.loads(done.stdout) == {"applied": [], "restart": ["queue.name"]}
    assert gateway.stop() == 0


def test_a_signal_that_comes_during_the_start_reloads_after_it(
    file: Path, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "early.py").write_text(
        "import os, signal\n"
        "from wsgateway.handlers import handler\n"
        "@handler('early')\n"
        "def early(): return None\n"
        "for number in (signal.SIGHUP, signal.SIGUSR1): os.kill(os.getpid(), number)\n"
    )
    file.write_text(CONFIG + "[handlers]\nmodules = ['early']\n")
    gateway = serve("--config", str(file), PYTHONPATH=str(tmp_path))
    log = wait_for(gateway, "reloaded applied=nothing")
    assert " ready " in log[: log.index("reloaded")]
    assert "dump: tasks=" in log
    assert gateway.stop() == 0


def test_a_name_that_was_made_up_stays(file: Path, serve: Serve) -> None:
    gateway = serve("--config", str(file))
    gateway.popen.send_signal(signal.SIGHUP)
    log = wait_for(gateway, "reloaded applied=nothing")
    assert "restart" not in log
    file.write_text(CONFIG + "[log]\nlevel='debug'\n[limits]\nmessages=5\n")
    gateway.popen.send_signal(signal.SIGHUP)
    log = wait_for(gateway, "reloaded applied=limits.messages,log.level")
    names = {line.split()[2] for line in log.splitlines() if " info " in line}
    assert len(names) == 1
    assert gateway.stop() == 0


def test_a_demo_reloads_and_stays_what_it_is(serve: Serve, tmp_path: Path) -> None:
    gateway = serve("--demo")
    gateway.popen.send_signal(signal.SIGHUP)
    wait_for(gateway, "reloaded applied=nothing")
    (tmp_path / "config.toml").write_text("[server]\nhost = '0.0.0.0'\n[limits]\nmessages = 5\n")
    gateway.popen.send_signal(signal.SIGHUP)
    assert "restart" not in wait_for(gateway, "reloaded applied=limits.messages")
    assert gateway.stop() == 0


def test_a_gateway_on_a_terminal_ends_with_it(
    file: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    log = tmp_path / "terminal.log"
    script = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from wsgateway.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with log.open("w") as stderr:
        popen = subprocess.Popen(
            [sys.executable, "-c", script, "serve", "--port", "0", "--config", str(file)],
            stdin=theirs, stdout=stderr, stderr=stderr, cwd=tmp_path, env=environment, text=True,
            start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    gateway = Process(popen, 0, 0, log)
    try:
        wait_for(gateway, " ready ")
        popen.send_signal(signal.SIGHUP)  # by somebody: the terminal is there
        wait_for(gateway, "reloaded")
        os.close(ours)
        assert popen.wait(20) == 0
        assert log.read_text().count("reloaded") == 1
    finally:
        popen.kill()
        popen.wait()


def test_a_dump_tells_every_task_and_counter_and_no_token(
    file: Path, serve: Serve, cli: Cli, loop: str
) -> None:
    made = cli("token", "create", "--user", "1", "--quiet", "--config", str(file))
    token = made.stdout.strip()
    gateway = serve("--config", str(file), "--loop", loop, "--log-level", "debug")

    async def visit() -> None:
        url = f"ws://127.0.0.1:{gateway.port}/ws/device/?token={token}"
        async with connect(url, compression=None) as device:
            await device.recv()
            assert (await ask(device, PING))["type"] == "pong"
            gateway.popen.send_signal(signal.SIGUSR1)
            await asyncio.to_thread(wait_for, gateway, "opened=1")
            assert (await ask(device, PING))["type"] == "pong"

    asyncio.run(visit())
    log = gateway.log.read_text()
    assert re.search(r"dump: tasks=\d+ stacks=\d+ not_looked_at=0", log)
    assert re.search(r"dump: 1 x .*wsgateway/listener\.py:\d+ in Listener\._tick", log)
    assert "connections=1" in log
    assert "received[ping]=1" in log
    assert token not in log
    assert gateway.stop() == 0
