"""Clients as fleets already run them talk to the gateway, frame by frame and reconnect by reconnect.

The JavaScript client runs in Node.js and in a page in Chromium (`tests/clients/`), the Python one
here. They connect through a tap that keeps the bytes both ways; what is expected is what crosses
the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response

from tests.clients.machines import Device, Machine, running_machine
from tests.clients.tap import Passage, Tap, TapFrame, tapped
from tests.conftest import Accounts, Instance, Process, eventually, running_gateway

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., Process]

SERVER_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00"
JAVASCRIPT_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
PYTHON_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?"  # local, without offset

STATUS = {"type": "connection_status", "status": "connected", "user_id": "1", "device_id": 1}
WEATHER = {
    "city": {"name": "上海"},
    "weather": {
        "now": {"temp": "25", "text": "晴", "icon": "100"},
        "updateTime": "2023-01-01T12:00:00Z",
    },
    "sample": True,
}
SONG = {"song": "青花瓷", "artist": "周杰伦"}
DANCE = {"dance": "街舞", "style": "hip-hop", "duration": "30秒"}
SAID: list[dict[str, Any]] = [
    {"type": "chat_message", "message": "你好 \N{GRINNING FACE}"},
    {"type": "weather", "message": {"city": "上海"}},
    {"type": "sing", "message": SONG},
    {"type": "dance", "message": DANCE},
    {"type": "ping", "message": {}},
]
"""What every client says at once after it connected, but for the times."""

HEARD: list[dict[str, Any]] = [
    {"type": "chat_response", "message": "收到消息:你好 \N{GRINNING FACE}"},
    {"type": "weather_response", "data": WEATHER},
    {
        "type": "sing_response",
        "data": SONG | {"action": "start_singing"},
        "message": "开始播放:青花瓷 - 周杰伦",
    },
    {
        "type": "dance_response",
        "data": DANCE | {"action": "start_dancing"},
        "message": "开始跳舞:街舞 (hip-hop)",
    },
    {"type": "pong"},
]
"""The answers, but for the times. An answer that waits may be overtaken."""

OVER_RATE = {"type": "error", "message": "Rate limit exceeded", "code": "RATE_LIMITED"}


def talk(frames: list[TapFrame], time: str) -> list[TapFrame]:
    """Frames but for keepalive, with T for a time of that form where a timestamp belongs."""
    pattern = re.compile(rf'("timestamp": ?)"{time}"\}}$')
    wanted = [frame for frame in frames if frame[0] not in ("PING", "PONG")]
    return [(kind, pattern.sub(r'\1"T"}', text)) for kind, text in wanted]


def compact(message: dict[str, Any]) -> TapFrame:
    """A message's frame as the gateway and JavaScript write it."""
    document = message | {"timestamp": "T"}
    return "TEXT", json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def spaced(message: dict[str, Any]) -> TapFrame:
    """A message's frame as Python writes it by default."""
    return "TEXT", json.dumps(message | {"timestamp": "T"})


def heard(passage: Passage) -> list[TapFrame]:
    return talk(passage.frames_heard(), SERVER_TIME)


def said(passage: Passage, time: str) -> list[TapFrame]:
    return talk(passage.frames_said(), time)


@contextlib.asynccontextmanager
async def tapped_gateway(
    accounts: Accounts, **overrides: object
) -> AsyncIterator[tuple[Instance, Tap]]:
    """A gateway and the tap before it."""
    async with running_gateway(accounts, **overrides) as gateway, tapped(gateway.port) as tap:
        yield gateway, tap


async def revoke(cli: Cli, accounts: Accounts) -> None:
    """Revoke the device's token as an operator does, from another process."""
    done = await asyncio.to_thread(
        cli, "token", "revoke", "-", "--set", f"auth.database={accounts.path}", stdin=accounts.token
    )
    assert done.returncode == 0, done.stderr


def demo_token(tmp_path: Path) -> str:
    """The token of `serve --demo`."""
    return (tmp_path / "state" / "wsgateway" / "demo.token").read_text().strip()


# The JavaScript client, in Node.js and in Chromium.


@pytest.fixture(scope="module", params=["node", "chromium"])
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    with running_machine(request.param, tmp_path_factory.mktemp("machine")) as running:
        yield running


def in_javascript(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test of the slow group; the first one may have to install packages."""
    marked: Callable[..., Any] = pytest.mark.browser(pytest.mark.timeout(180)(test))
    return marked


def delays(device: Device) -> list[float | None]:
    """After each close, in how many milliseconds the client comes back; None: it does not."""
    return [event["delay"] for event in device.of("closed")]


@in_javascript
async def test_what_the_javascript_client_and_the_gateway_say_to_each_other(
    machine: Machine, accounts: Accounts
) -> None:
    async with tapped_gateway(accounts) as (_, tap):
        with machine.device(tap.url, accounts.token) as device:
            await device.until("message")
            device.call(
                ("chat", SAID[0]["message"]),
                ("weather", "上海"),
                ("sing", *SONG.values()),
                ("dance", DANCE["dance"], DANCE["style"]),
                ("send", "ping", {}),
            )
            messages = await device.until("message", 1 + len(HEARD))
        (passage,) = tap.passages
        assert passage.request == f"GET /ws/device/?token={accounts.token} HTTP/1.1"
        assert passage.header("origin") == machine.origin
        assert said(passage, JAVASCRIPT_TIME)[:5] == [compact(m) for m in SAID]
        status, *answers = heard(passage)[:6]
        assert status == compact(STATUS)
        assert sorted(answers) == sorted(compact(message) for message in HEARD)
        texts = [json.loads(text) for kind, text in passage.frames_heard() if kind == "TEXT"]
        assert texts == [event["message"] for event in messages]


@in_javascript
async def test_the_javascript_client_talks_compressed_where_that_is_switched_on(
    machine: Machine, accounts: Accounts
) -> None:
    text = "压缩我 " * 500
    async with running_gateway(accounts, compression__enabled=True) as gateway:
        metrics = gateway.running.instance.metrics
        with machine.device(f"ws://127.0.0.1:{gateway.port}", accounts.token) as device:
            await device.until("message")
            before = metrics.received_bytes
            device.call(("chat", text), ("chat", "short"))
            messages = await device.until("message", 3)
            gateway.running.instance.gateway.to_user(1, {"type": "news", "text": text})
            news = (await device.until("message", 4))[3]["message"]
        answers = [event["message"]["message"] for event in messages[1:]]
        assert sorted(answers) == sorted(f"收到消息:{each}" for each in (text, "short"))
        assert news == {"type": "news", "text": text}
        assert metrics.compression_agreed == 1
        assert metrics.compression_input_bytes > 2 * len(text.encode())
        assert metrics.compression_output_bytes < 1000
        assert metrics.received_bytes - before < 1000


@in_javascript
async def test_heartbeats_of_the_javascript_client_are_answered_and_it_answers_pings(
    machine: Machine, accounts: Accounts
) -> None:
    options = {"keepalive__interval": 0.2, "keepalive__timeout": 20}
    async with tapped_gateway(accounts, **options) as (_, tap):
        with machine.device(tap.url, accounts.token, heartbeat=100) as device:
            await device.until("message", 11)
            await eventually(lambda: ("PONG", "") in tap.passages[0].frames_said())
        (passage,) = tap.passages
        heartbeats = said(passage, JAVASCRIPT_TIME)[:10]
        assert heartbeats == [compact({"type": "ping", "message": {}})] * 10
        assert heard(passage)[:11] == [compact(STATUS), *[compact({"type": "pong"})] * 10]


@in_javascript
async def test_the_javascript_client_that_is_refused_gives_up_after_six_tries(
    machine: Machine, accounts: Accounts
) -> None:
    async with tapped_gateway(accounts) as (gateway, tap):
        with machine.device(tap.url, "wsg_nobody", backoff=20) as device:
            await device.until("closed", 6)
            device.command("wait", 20 * 2**6)  # when a seventh try would be due
            await device.until("waited")
        assert tap.statuses == [403] * 6
        assert gateway.running.instance.metrics.refused == {"unknown": 6}
        assert delays(device) == [40, 80, 160, 320, 640, None]
        assert [event["code"] for event in device.of("closed")] == [1006] * 6
        pauses = [
            later.started_at - earlier.started_at
            for earlier, later in itertools.pairwise(tap.passages)
        ]
        assert all(pause > 0.018 * 2**n for n, pause in enumerate(pauses, 1)), pauses
        assert device.of("open") == []


@in_javascript
def test_the_javascript_client_comes_back_by_itself_after_a_restart(
    machine: Machine, serve: Serve, tmp_path: Path
) -> None:
    gateway = serve("--demo")
    url = f"ws://127.0.0.1:{gateway.port}"
    with machine.device(url, demo_token(tmp_path), backoff=200) as device:
        device.wait("message")
        assert gateway.stop() == 0
        serve("--demo", "--port", str(gateway.port))
        device.wait("message", 2)
        device.call(("chat", "又见面了"))
        *_, answer = device.wait("message", 3)
        goodbye, *refused = device.of("closed")
    assert (goodbye["code"], goodbye["wasClean"], goodbye["delay"]) == (1012, True, 400)
    assert re.fullmatch(r'\{"retry_ms":\d+\}', goodbye["reason"])
    assert {event["code"] for event in refused} <= {1006}  # tries while nobody listened
    assert answer["message"]["message"] == "收到消息:又见面了"


@in_javascript
async def test_the_javascript_client_whose_token_is_revoked_is_cut_and_then_refused(
    machine: Machine, accounts: Accounts, cli: Cli
) -> None:
    async with tapped_gateway(accounts) as (_, tap):
        with machine.device(tap.url, accounts.token, backoff=20) as device:
            await device.until("message")
            await revoke(cli, accounts)
            first, *others = await device.until("closed", 6)
        assert (first["code"], first["reason"], first["wasClean"]) == (4001, "revoked", True)
        assert [event["code"] for event in others] == [1006] * 5
        assert delays(device) == [40, 80, 160, 320, 640, None]
        assert tap.statuses == [101, *[403] * 5]
        assert heard(tap.passages[0]) == [compact(STATUS), ("CLOSE", "4001 revoked")]
        assert said(tap.passages[0], JAVASCRIPT_TIME) == [("CLOSE", "4001 revoked")]


@in_javascript
async def test_the_javascript_client_over_its_rate_is_cut_and_gets_in_again_when_it_is_over(
    machine: Machine, accounts: Accounts
) -> None:
    limits = {"limits__messages": 3, "limits__window": 2}
    too_many: list[tuple[object, ...]] = [("send", "ping", {})] * 4
    async with tapped_gateway(accounts, **limits) as (_, tap):
        with machine.device(tap.url, accounts.token, backoff=80) as device:
            await device.until("message")
            device.call(*too_many)
            await device.until("open", 2)
            tries = len(tap.passages)
            device.call(*too_many)
            closes = await device.until("closed", tries)
        first, *refused, last = tap.passages[:tries]
        conversation = [
            compact(STATUS),
            *[compact({"type": "pong"})] * 3,
            compact(OVER_RATE),
            ("CLOSE", "4008"),
        ]
        assert heard(first) == conversation
        assert heard(last) == conversation
        assert refused
        assert {passage.status for passage in refused} == {503}
        codes = [event["code"] for event in closes[:tries]]
        assert codes == [4008, *[1006] * len(refused), 4008]
        assert closes[tries - 1]["delay"] == 160, "the counter began anew when it was in"


@in_javascript
async def test_the_javascript_client_that_disconnects_gets_its_1000_back_and_stays_away(
    machine: Machine, accounts: Accounts
) -> None:
    async with tapped_gateway(accounts) as (gateway, tap):
        with machine.device(tap.url, accounts.token, backoff=20) as device:
            await device.until("message")
            device.call(("disconnect",))
            (closed,) = await device.until("closed")
            device.command("wait", 200)
            await device.until("waited")
        assert (closed["code"], closed["reason"], closed["wasClean"]) == (1000, "用户离线", True)
        assert closed["delay"] is None
        (passage,) = tap.passages
        assert said(passage, JAVASCRIPT_TIME) == [("CLOSE", "1000 用户离线")]
        assert heard(passage) == [compact(STATUS), ("CLOSE", "1000 用户离线")]
        await eventually(lambda: gateway.running.instance.metrics.closed == {"1000": 1})


@in_javascript
@pytest.mark.parametrize(
    ("origins", "required", "page", "program"),
    [
        pytest.param(["*"], False, 101, 101, id="all"),
        pytest.param(["https://a.example", "PAGE"], False, 101, 101, id="listed"),
        pytest.param(["https://a.example"], False, 403, 101, id="not-listed"),
        pytest.param(["PAGE"], True, 101, 403, id="listed-and-required"),
    ],
)
async def test_the_origin_of_a_page_decides_where_origins_are_listed(
    origins: list[str], required: bool, page: int, program: int,
    machine: Machine, accounts: Accounts,
) -> None:  # fmt: skip
    options = {
        "auth__origins": [machine.control.address if o == "PAGE" else o for o in origins],
        "auth__require_origin": required,
    }
    expected = page if machine.origin else program
    async with tapped_gateway(accounts, **options) as (gateway, tap):
        with machine.device(tap.url, accounts.token, backoff=60_000) as device:
            await device.until("message" if expected == 101 else "closed")
        assert tap.statuses == [expected]
        assert tap.passages[0].header("origin") == machine.origin
        assert gateway.running.instance.metrics.refused == (
            {"origin": 1} if expected == 403 else {}
        )


# The Python client.


class PythonClient:
    """A device's client as fleets already run it with the library `websockets`.

    connect() takes messages until the connection ends; it never comes back by itself.
    """

    def __init__(self, token: str, base: str) -> None:
        self._url = f"{base}/ws/device/?token={token}"
        self._socket: ClientConnection | None = None
        self._wanted = False
        self.messages: list[dict[str, Any]] = []

    @property
    def close_code(self) -> int | None:
        return self._socket.close_code if self._socket else None

    async def connect(self) -> None:
        self._socket = await connect(self._url)
        self._wanted = True
        with contextlib.suppress(ConnectionClosed):
            async for text in self._socket:
                if not self._wanted:
                    return
                self.messages.append(json.loads(text))

    async def disconnect(self) -> None:
        self._wanted = False
        if self._socket is not None:
            await self._socket.close()

    async def send(self, kind: str, message: object) -> None:
        assert self._socket is not None
        now = datetime.now().isoformat()  # noqa: DTZ005 - as it is done: local, without offset
        await self._socket.send(json.dumps({"type": kind, "message": message, "timestamp": now}))


@contextlib.asynccontextmanager
async def python_client(url: str, token: str) -> AsyncIterator[tuple[PythonClient, Any]]:
    """A Python client that has received its connection_status, and the task that listens."""
    client = PythonClient(token, url)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(client.connect())
        await eventually(lambda: client.messages or listening.done())
        yield client, listening
        await client.disconnect()


async def refusal(client: PythonClient) -> Response:
    """The answer to a client that is not let in."""
    with pytest.raises(InvalidStatus) as refused:
        async with asyncio.timeout(20):
            await client.connect()
    return refused.value.response


async def test_what_the_python_client_and_the_gateway_say_to_each_other(accounts: Accounts) -> None:
    async with tapped_gateway(accounts) as (_, tap):
        async with python_client(tap.url, accounts.token) as (client, _):
            for message in SAID:
                await client.send(message["type"], message["message"])
            await eventually(lambda: len(client.messages) == 1 + len(HEARD))
        (passage,) = tap.passages
        assert passage.request == f"GET /ws/device/?token={accounts.token} HTTP/1.1"
        messages = [spaced(message) for message in SAID]
        assert said(passage, PYTHON_TIME) == [*messages, ("CLOSE", "1000")]
        status, *answers, goodbye = heard(passage)
        assert (status, goodbye) == (compact(STATUS), ("CLOSE", "1000"))
        assert sorted(answers) == sorted(compact(message) for message in HEARD)
        texts = [json.loads(text) for kind, text in passage.frames_heard() if kind == "TEXT"]
        assert texts == client.messages
        assert client.close_code == 1000


async def test_the_python_client_that_is_refused_reads_403(accounts: Accounts) -> None:
    async with tapped_gateway(accounts) as (_, tap):
        response = await refusal(PythonClient("wsg_nobody", tap.url))
        assert (response.status_code, response.body) == (403, b'{"error":"unauthorized"}')
        assert tap.statuses == [403]


async def test_the_python_client_is_told_of_a_restart_and_connects_again(
    serve: Serve, tmp_path: Path
) -> None:
    gateway = await asyncio.to_thread(serve, "--demo")
    url, token = f"ws://127.0.0.1:{gateway.port}", demo_token(tmp_path)
    async with python_client(url, token) as (client, listening):
        assert await asyncio.to_thread(gateway.stop) == 0
        await listening
        assert client.close_code == 1012
        await asyncio.to_thread(serve, "--demo", "--port", str(gateway.port))
    async with python_client(url, token) as (client, _):
        await client.send("chat_message", "又见面了")
        await eventually(lambda: len(client.messages) == 2)
    assert client.messages[1]["message"] == "收到消息:又见面了"


async def test_the_python_client_whose_token_is_revoked_is_cut_and_then_refused(
    accounts: Accounts, cli: Cli
) -> None:
    async with tapped_gateway(accounts) as (_, tap):
        async with python_client(tap.url, accounts.token) as (client, listening):
            await revoke(cli, accounts)
            await listening
            assert client.close_code == 4001
        assert (await refusal(client)).status_code == 403
        assert heard(tap.passages[0]) == [compact(STATUS), ("CLOSE", "4001 revoked")]


async def test_the_python_client_over_its_rate_is_cut_and_wins_nothing_by_coming_back(
    accounts: Accounts,
) -> None:
    async with tapped_gateway(accounts, limits__messages=3) as (_, tap):
        async with python_client(tap.url, accounts.token) as (client, listening):
            for _ in range(4):
                await client.send("ping", {})
            await listening
            assert client.close_code == 4008
        response = await refusal(client)
        assert response.status_code == 503
        assert 0 < int(response.headers["Retry-After"]) <= 60
        assert heard(tap.passages[0]) == [
            compact(STATUS),
            *[compact({"type": "pong"})] * 3,
            compact(OVER_RATE),
            ("CLOSE", "4008"),
        ]
