"""What a device sees on its socket, row by row of PROTOCOL section 1.

A device is the library's client where that can say it, else a `Peer`, which can send any bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode, apply_mask

from tests.conftest import Accounts, Instance, ask, eventually, running_gateway
from wsgateway import config, store
from wsgateway.errors import InvalidMessage, ServiceError
from wsgateway.gateway import user_group
from wsgateway.handlers import Device, handler
from wsgateway.limits import Departed, Window
from wsgateway.providers import Services

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")
UPGRADE = (
    "Host: gateway",
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
VERSIONED = "Sec-WebSocket-Protocol: wsgateway.v1"
UNAUTHORIZED = b'{"error":"unauthorized"}'
UNAVAILABLE = b'{"error":"unavailable"}'
PING = {"type": "ping"}
MASK = b"\x12\x34\x56\x78"


# A peer that can send any bytes.


def request(
    target: str, *headers: str, method: str = "GET", upgrade: tuple[str, ...] = UPGRADE
) -> bytes:
    """A handshake request."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", *upgrade, *headers, "", ""]).encode()


def frame(data: bytes | object, opcode: Opcode = Opcode.TEXT, fin: bool = True) -> bytes:
    """A masked frame; what is not bytes goes as JSON."""
    payload = data if isinstance(data, bytes) else orjson.dumps(data)
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([fin << 7 | opcode]) + length + MASK + apply_mask(payload, MASK)


class Answer(NamedTuple):
    """An HTTP response; ``headers`` by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes


class Heard(NamedTuple):
    """A frame of the gateway's."""

    opcode: int
    data: bytes

    @property
    def message(self) -> dict[str, Any]:
        assert self.opcode == Opcode.TEXT
        document: dict[str, Any] = orjson.loads(self.data)
        return document

    @property
    def code(self) -> int:
        """The code of a close frame."""
        assert self.opcode == Opcode.CLOSE, self
        return int.from_bytes(self.data[:2], "big")


class Peer:
    """A client that does nothing of its own accord: no pong, no close frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.transport = writer.transport

    def send(self, *parts: bytes) -> None:
        self.transport.write(b"".join(parts))

    async def answer(self) -> Answer:
        """The response to a request; one that is no WebSocket ends the connection."""
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {
                name.lower(): value
                for name, _, value in (line.partition(": ") for line in head[1:] if line)
            }
            status = int(head[0].removeprefix("HTTP/1.1 ")[:3])
            body = b"" if status == 101 else await self.reader.read()
        return Answer(status, headers, body)

    async def hear(self) -> Heard:
        """The next frame. Raises IncompleteReadError or ConnectionError at the end."""
        async with asyncio.timeout(10):
            first, length = await self.reader.readexactly(2)
            if length == 126:
                length = int.from_bytes(await self.reader.readexactly(2), "big")
            elif length == 127:
                length = int.from_bytes(await self.reader.readexactly(8), "big")
            assert first & 0xF0 == 0x80, "the gateway sends whole, plain frames"
            return Heard(first & 0x0F, await self.reader.readexactly(length))

    async def hear_rest(self) -> list[Heard]:
        """All frames until the gateway ends the connection."""
        heard = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                heard.append(await self.hear())
        return heard

    async def gone(self) -> None:
        """Wait until the gateway has ended the connection, and read all that came before."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await self.reader.read()


@contextlib.asynccontextmanager
async def peer(
    gateway: Instance,
    *sent: bytes,
    token: str | None = None,
    upgraded: bool = False,
    receive_buffer: int = 0,
) -> AsyncIterator[Peer]:
    """A connected peer that has sent some bytes; aborted when leaving.

    With ``upgraded`` it is a device that has received its connection_status.
    """
    end = socket.socket()
    if receive_buffer:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    end.setblocking(False)
    await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", gateway.port))
    reader, writer = await asyncio.open_connection(sock=end)
    made = Peer(reader, writer)
    try:
        if upgraded:
            made.send(request(f"/ws/device/?token={token or gateway.token}"))
            assert (await made.answer()).status == 101
            assert (await made.hear()).message["type"] == "connection_status"
        if sent:
            made.send(*sent)
        yield made
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def fetch(gateway: Instance, sent: bytes) -> Answer:
    async with peer(gateway, sent) as client:
        return await client.answer()


async def outcome(gateway: Instance, sent: bytes) -> str:
    """What a handshake comes to: the user, else the HTTP status, else the close code."""
    async with peer(gateway, sent) as client:
        answer = await client.answer()
        if answer.status != 101:
            return str(answer.status)
        first = await client.hear()
        return first.message["user_id"] if first.opcode == Opcode.TEXT else str(first.code)


async def close_of(device: ClientConnection) -> ConnectionClosed:
    """Read until the end; how it ended."""
    async with asyncio.timeout(20):
        try:
            while True:
                await device.recv()
        except ConnectionClosed as closed:
            return closed


async def close_code(device: ClientConnection) -> int | None:
    """The code that the gateway closes with; None if it sends no close frame."""
    received = (await close_of(device)).rcvd
    return received.code if received else None


def untimed(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its time, which is checked."""
    assert TIME.fullmatch(message.pop("timestamp"))
    return message


def error(text: str, code: str) -> dict[str, str]:
    return {"type": "error", "message": text, "code": code}


# Types of a user's own, for `handlers.modules`.


class Light(msgspec.Struct):
    on: bool
    level: int = 100


@handler("light")
async def light(message: Light, device: Device) -> dict[str, Any]:
    return {"on": message.on, "level": message.level, "user": device.user_id}


@handler("quiet")
def quiet() -> None:
    """Answers nothing."""


@handler("count")
def count(message: int) -> dict[str, Any]:
    return {"type": "counted", "count": message}


@handler("shout")
def shout(message: str, device: Device) -> dict[str, Any]:
    device.send({"type": "whisper"})
    sent = device.gateway.to_user(device.user_id, {"type": "shouted", "message": message})
    return {"matched": sent.matched}


@handler("no_service")
async def no_service() -> None:
    raise ServiceError("the service is closed")


@handler("blames")
def blames() -> None:
    raise InvalidMessage({"message.level": ["Too bright."]})


@handler("raises")
def raises() -> None:
    raise RuntimeError("hunter2")


@handler("raises_later")
async def raises_later() -> None:
    raise RuntimeError("hunter2")


@handler("unsayable")
def unsayable() -> dict[str, Any]:
    return {"data": object()}


@handler("never")
async def never() -> None:
    await asyncio.Event().wait()


# The way in.


def test_the_numbers_of_the_protocol_are_the_defaults() -> None:
    limits, keepalive = config.Limits(), config.Keepalive()
    assert (limits.messages, limits.window) == (100, 60)
    assert (limits.message_characters, limits.message_bytes) == (10_240, 65_536)
    assert (keepalive.interval, keepalive.timeout) == (20, 20)
    assert config.Auth().lookup_timeout == 2


async def test_a_device_is_told_that_it_is_connected(gateway: Instance) -> None:
    async with connect(gateway.url()) as device:
        status = orjson.loads(await device.recv())
    sent_at = datetime.fromisoformat(status["timestamp"])
    assert abs(datetime.now(UTC) - sent_at) < timedelta(minutes=1)
    assert untimed(status) == {
        "type": "connection_status",
        "status": "connected",
        "user_id": "1",
        "device_id": 1,
    }


async def test_a_user_without_a_device_is_let_in_with_a_warning(
    gateway: Instance, accounts: Accounts, caplog: pytest.LogCaptureFixture
) -> None:
    user, _ = await accounts.add_user("bob")
    async with connect(gateway.url(await accounts.add_token(user))) as device:
        status = orjson.loads(await device.recv())
        assert list(gateway.running.instance.gateway.hub.groups()) == ["all", user_group(user)]
    assert (status["user_id"], status["device_id"]) == (str(user), None)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"user={user}" in warnings[0].getMessage()


async def test_a_bound_token_joins_its_device_and_any_other_the_primary_one(
    gateway: Instance, accounts: Accounts
) -> None:
    async with store.open_to_write(accounts.path) as db:
        second = await db.add_device("lamp")
        await db.bind(1, second)
    bound = await accounts.add_token(device_id=second)
    async with gateway.device() as primary, connect(gateway.url(bound)) as lamp:
        status = orjson.loads(await lamp.recv())
        assert (status["user_id"], status["device_id"]) == ("1", second)
        for send, hearers in (
            (lambda: gateway.running.instance.gateway.to_device(1, {"n": 1}), [primary]),
            (lambda: gateway.running.instance.gateway.to_device(second, {"n": 2}), [lamp]),
            (lambda: gateway.running.instance.gateway.to_user(1, {"n": 3}), [primary, lamp]),
            (lambda: gateway.running.instance.gateway.to_all({"n": 4}), [primary, lamp]),
        ):
            assert (await send()).written == len(hearers)
        assert [orjson.loads(await primary.recv())["n"] for _ in range(3)] == [1, 3, 4]
        assert [orjson.loads(await lamp.recv())["n"] for _ in range(3)] == [2, 3, 4]
    await eventually(lambda: len(gateway.running.instance.gateway.hub) == 0)


TARGETS = [
    "/ws/device?token={token}",
    "/ws/device/?token={token}",
    "/ws/device/?token={quoted}",
    "/ws/device/?a=b&token={token}&token=other",
    "/ws/device/token/{token}",
    "/ws/device/token/{token}/",
    "/ws/device/token/{quoted}/",
    "/ws/device/1?token={token}",
    "/ws/device/1/?token={token}",
]


@pytest.mark.parametrize("target", TARGETS)
async def test_every_path_leads_in(gateway: Instance, target: str) -> None:
    quoted = "".join(f"%{ord(letter):02x}" for letter in gateway.token)
    assert await outcome(gateway, request(target.format(token=gateway.token, quoted=quoted))) == "1"


NOWHERE = [
    "/",
    "/ws",
    "/ws/device/abc",
    "/ws/device/-1",
    "/ws/device/1/2",
    "/ws/device//",
    "/ws/device/token/",
    "/ws/device/token/{token}/more",
    "/ws/devices/?token={token}",
    "/WS/DEVICE/?token={token}",
    "/x/../ws/device/?token={token}",
    "/healthz/",
]


@pytest.mark.parametrize("upgrade", [UPGRADE, ("Host: gateway",)], ids=["websocket", "plain"])
@pytest.mark.parametrize("target", NOWHERE)
async def test_any_other_path_leads_nowhere(
    gateway: Instance, target: str, upgrade: tuple[str, ...]
) -> None:
    answer = await fetch(gateway, request(target.format(token=gateway.token), upgrade=upgrade))
    assert (answer.status, answer.body) == (404, b'{"error":"not found"}')
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("target", "headers", "expected"),
    [
        ("/ws/device/", ["Authorization: Token {alice}"], "1"),
        ("/ws/device/", ["Authorization: Bearer {alice}"], "1"),
        ("/ws/device/", ["authorization: bEARER {alice}"], "1"),
        ("/ws/device/", ["Sec-WebSocket-Protocol: wsgateway.v1, token.{alice}"], "1"),
        ("/ws/device/", ["Sec-WebSocket-Protocol: token.{alice},wsgateway.v1"], "1"),
        ("/ws/device/", [VERSIONED, "Sec-WebSocket-Protocol: token.{alice}"], "1"),
        ("/ws/device/", ["Sec-WebSocket-Protocol: token.{alice}"], "403"),
        ("/ws/device/", ["Sec-WebSocket-Protocol: other, token.{alice}"], "403"),
        (
            "/ws/device/?token={carol}",
            [
                "Authorization: Token {alice}",
                "Sec-WebSocket-Protocol: wsgateway.v1, token.{bob}",
            ],
            "1",
        ),
        (
            "/ws/device/?token={carol}",
            ["Sec-WebSocket-Protocol: wsgateway.v1, token.{bob}"],
            "2",
        ),
        ("/ws/device/?token={carol}", ["Sec-WebSocket-Protocol: token.{bob}"], "3"),
        ("/ws/device/?token={carol}", [VERSIONED], "3"),
        ("/ws/device/?token={carol}", ["Authorization: Basic {alice}"], "3"),
        (
            "/ws/device/token/{carol}?token={alice}",
            [
                "Authorization: Token {alice}",
                "Sec-WebSocket-Protocol: wsgateway.v1, token.{bob}",
            ],
            "3",
        ),
        ("/ws/device/2/?token={carol}", [], "3"),
        ("/ws/device/?token={alice}", ["Authorization: Token wrong"], "403"),
        (
            "/ws/device/?token={alice}",
            ["Sec-WebSocket-Protocol: wsgateway.v1, token.wrong"],
            "4001",
        ),
        ("/ws/device/token/wrong?token={alice}", ["Authorization: Token {alice}"], "403"),
        (
            "/ws/device/?token={alice}",
            ["Authorization: Token {alice}", "Authorization: Token {bob}"],
            "403",
        ),
    ],
)
async def test_the_token_comes_from_the_first_place_that_has_one(
    gateway: Instance, accounts: Accounts, target: str, headers: list[str], expected: str
) -> None:
    tokens = {"alice": accounts.token}
    for name in ("bob", "carol"):
        user, _ = await accounts.add_user(name)
        tokens[name] = await accounts.add_token(user)
    lines = [line.format(**tokens) for line in headers]
    assert await outcome(gateway, request(target.format(**tokens), *lines)) == expected


async def test_a_path_with_another_users_id_is_counted_and_logged_once(
    gateway: Instance, accounts: Accounts, caplog: pytest.LogCaptureFixture
) -> None:
    sent = request(f"/ws/device/99/?token={accounts.token}")
    assert [await outcome(gateway, sent) for _ in range(3)] == ["1"] * 3
    assert await outcome(gateway, request(f"/ws/device/1/?token={accounts.token}")) == "1"
    assert gateway.running.instance.metrics.path_id_mismatches == 3
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "user=1" in warnings[0].getMessage()


@pytest.mark.parametrize(("path_id", "expected"), [(1, "1"), (99, "403")])
async def test_strict_path_id_refuses_another_users_id(
    accounts: Accounts, path_id: int, expected: str
) -> None:
    async with running_gateway(accounts, auth__strict_path_id=True) as gateway:
        sent = request(f"/ws/device/{path_id}/?token={accounts.token}")
        assert await outcome(gateway, sent) == expected


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("wsgateway.v1", "wsgateway.v1"),
        ("other, wsgateway.v1", "wsgateway.v1"),
        ("wsgateway.v1, token.{token}", "wsgateway.v1"),
        ("token.{token}", None),
        ("other", None),
    ],
)
async def test_the_answer_names_the_subprotocol_and_never_the_token(
    gateway: Instance, offered: str, chosen: str | None
) -> None:
    header = f"Sec-WebSocket-Protocol: {offered.format(token=gateway.token)}"
    async with peer(gateway, request(f"/ws/device/?token={gateway.token}", header)) as client:
        answer = await client.answer()
    assert answer.status == 101
    assert answer.headers.get("sec-websocket-protocol") == chosen


async def test_an_offer_to_compress_is_not_taken_up(gateway: Instance) -> None:
    async with connect(gateway.url(), compression="deflate") as device:
        assert device.response is not None
        assert "Sec-WebSocket-Extensions" not in device.response.headers
        await device.recv()
        assert untimed(await ask(device, PING)) == {"type": "pong"}


# The ways not in.

REASONS = ["missing", "unknown", "too long", "expired", "revoked", "disabled", "api", "admin"]


async def refused_token(accounts: Accounts, why: str) -> str:
    """A token that opens nothing."""
    match why:
        case "missing":
            return ""
        case "unknown":
            return "wsg_unknown"
        case "too long":
            return "x" * 300
        case "expired":
            return await accounts.add_token(expires_at=int(time.time()) - 1)
        case "api" | "admin":
            return await accounts.add_token(scope=why)
        case "revoked":
            accounts.execute("UPDATE tokens SET revoked_at = 1")
        case "disabled":
            accounts.execute("UPDATE users SET active = 0")
    return accounts.token


@pytest.mark.parametrize(
    ("refuse", "header", "expected"),
    [("http", "X: y", "403"), ("http", VERSIONED, "4001"), ("close", "X: y", "4001")],
    ids=["http", "versioned", "close"],
)
@pytest.mark.parametrize("why", REASONS)
async def test_whoever_may_not_come_in_is_refused_without_a_reason(
    accounts: Accounts,
    caplog: pytest.LogCaptureFixture,
    why: str,
    refuse: str,
    header: str,
    expected: str,
) -> None:
    caplog.set_level("DEBUG")
    token = await refused_token(accounts, why)
    reason = {"too long": "unknown", "api": "scope", "admin": "scope"}.get(why, why)
    async with running_gateway(accounts, auth__refuse=refuse) as gateway:
        query = f"?token={token}" if token else ""
        async with peer(gateway, request(f"/ws/device/{query}", header)) as client:
            answer = await client.answer()
            if expected == "403":
                assert (answer.status, answer.body) == (403, UNAUTHORIZED)
                assert answer.headers == {
                    "content-type": "application/json",
                    "content-length": str(len(UNAUTHORIZED)),
                    "cache-control": "no-store",
                    "connection": "close",
                }
            else:
                assert answer.status == 101
                assert await client.hear() == (Opcode.CLOSE, (4001).to_bytes(2, "big"))
        assert gateway.running.instance.metrics.refused == {reason: 1}
    assert f"reason={reason}" in caplog.text
    assert not token or token not in caplog.text


@pytest.mark.parametrize(
    ("origin", "require", "expected"),
    [
        ("https://app.example", False, "1"),
        (None, False, "1"),
        ("https://evil.example", False, "403"),
        ("null", False, "403"),
        ("https://app.example.evil", False, "403"),
        ("https://app.example", True, "1"),
        (None, True, "403"),
    ],
)
async def test_origins_are_an_allow_list(
    accounts: Accounts, origin: str | None, require: bool, expected: str
) -> None:
    headers = [f"Origin: {origin}"] if origin else []
    async with running_gateway(
        accounts, auth__origins=["https://app.example"], auth__require_origin=require
    ) as gateway:
        sent = request(f"/ws/device/?token={accounts.token}", VERSIONED, *headers)
        assert await outcome(gateway, sent) == expected
        assert gateway.running.instance.metrics.refused["origin"] == (expected == "403")


async def test_any_origin_may_come_by_default(gateway: Instance) -> None:
    sent = request(f"/ws/device/?token={gateway.token}", "Origin: null")
    assert await outcome(gateway, sent) == "1"


@pytest.mark.parametrize(
    ("why", "limit"),
    [
        ("full", "limits__connections"),
        ("user_full", "limits__connections_per_user"),
        ("address_full", "limits__connections_per_ip"),
    ],
)
async def test_who_comes_when_it_is_full_is_to_come_again(
    accounts: Accounts, why: str, limit: str
) -> None:
    async with (
        running_gateway(accounts, **{limit: 1}) as gateway,
        gateway.device() as device,
    ):
        for header in ("X: y", VERSIONED):
            answer = await fetch(gateway, request(f"/ws/device/?token={gateway.token}", header))
            assert (answer.status, answer.body) == (503, UNAVAILABLE)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert gateway.running.instance.metrics.refused == {why: 2}
        assert untimed(await ask(device, PING)) == {"type": "pong"}
        await device.close()
        await eventually(lambda: gateway.running.instance.listener.connections == 0)
        async with gateway.device():
            pass


async def test_who_comes_with_too_many_others_is_to_come_again(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__handshakes=1) as gateway, peer(gateway):
        await eventually(lambda: gateway.running.instance.listener.connections == 1)
        answer = await fetch(gateway, request(f"/ws/device/?token={gateway.token}"))
        assert (answer.status, answer.body) == (503, UNAVAILABLE)
        assert gateway.running.instance.metrics.refused == {"handshakes": 1}


async def test_who_comes_while_it_drains_is_to_come_again(accounts: Accounts) -> None:
    async with running_gateway(accounts) as gateway:
        async with peer(gateway) as late, peer(gateway) as curious, peer(gateway) as last:
            await eventually(lambda: gateway.running.instance.listener.connections == 3)
            gateway.stop.set()
            await eventually(lambda: gateway.running.instance.admission.draining)
            late.send(request(f"/ws/device/?token={gateway.token}", VERSIONED))
            answer = await late.answer()
            assert (answer.status, answer.body) == (503, UNAVAILABLE)
            assert int(answer.headers["retry-after"]) >= 1
            curious.send(request("/readyz", upgrade=()))
            answer = await curious.answer()
            assert answer.status == 503
            assert orjson.loads(answer.body) == {"status": "unavailable", "reasons": ["draining"]}
            last.send(request("/healthz", upgrade=()))
            assert (await last.answer()).status == 200
        await gateway.task


NOT_A_WEBSOCKET = (
    b"Failed to open a WebSocket connection: %s.\n\n"
    b"You cannot access a WebSocket server directly with a browser. "
    b"You need a WebSocket client.\n"
)


@pytest.mark.parametrize(
    ("sent", "status", "body", "headers"),
    [
        (request("/healthz", upgrade=()), 200, b'{"status":"ok"}', {}),
        (request("/readyz", upgrade=()), 200, b'{"status":"ok","reasons":[]}', {}),
        (request("/healthz?x=y", upgrade=()), 200, b'{"status":"ok"}', {}),
        (request("/healthz", upgrade=(), method="HEAD"), 200, b"", {"content-length": "15"}),
        (
            request("/healthz", upgrade=(), method="POST"),
            405, b'{"error":"use GET"}', {"allow": "GET, HEAD"},
        ),
        (
            request("/ws/device/?token=x", upgrade=()),
            426, NOT_A_WEBSOCKET % b"missing Connection header", {"upgrade": "websocket"},
        ),
        (
            request("/ws/device/token/x", "Connection: keep-alive", upgrade=()),
            426, NOT_A_WEBSOCKET % b"invalid Connection header: keep-alive",
            {"upgrade": "websocket"},
        ),
        (
            request("/ws/device/", method="POST"),
            405,
            b"Failed to open a WebSocket connection: unsupported HTTP method: POST.\n",
            {"allow": "GET"},
        ),
        (request("/ws/device/", *["X: " + "y" * 4000] * 5), 431, b"", {"content-length": "0"}),
    ],
    ids=["healthz", "readyz", "query", "HEAD", "POST healthz", "plain", "kept", "POST", "large"],
)  # fmt: skip
async def test_requests_for_something_else_are_answered(
    gateway: Instance, sent: bytes, status: int, body: bytes, headers: dict[str, str]
) -> None:
    answer = await fetch(gateway, sent)
    assert (answer.status, answer.body) == (status, body)
    assert headers.items() <= answer.headers.items()
    assert answer.headers["connection"] == "close"


async def test_readiness_follows_the_token_database(gateway: Instance, accounts: Accounts) -> None:
    away = accounts.path.rename(accounts.path.with_suffix(".away"))
    answer = await fetch(gateway, request("/readyz", upgrade=()))
    assert answer.status == 503
    assert orjson.loads(answer.body) == {"status": "unavailable", "reasons": ["database"]}
    assert (await fetch(gateway, request("/healthz", upgrade=()))).status == 200
    answer = await fetch(gateway, request(f"/ws/device/?token={gateway.token}"))
    assert (answer.status, answer.body) == (503, UNAVAILABLE)
    away.rename(accounts.path)
    await eventually(lambda: gateway.running.instance.authenticator.usable)
    assert await outcome(gateway, request(f"/ws/device/?token={gateway.token}")) == "1"


@pytest.mark.parametrize(("header", "expected"), [(VERSIONED, "4000"), ("X: y", "500")])
async def test_an_internal_error_while_connecting_is_told_without_its_text(
    gateway: Instance, caplog: pytest.LogCaptureFixture, header: str, expected: str
) -> None:
    class BrokenMemory(Departed):
        """A part that fails in a way nobody foresaw."""

        def inherit(self, owner: object, now: float) -> Window:
            raise RuntimeError("hunter2")

    gateway.running.instance.admission.departed = BrokenMemory(1, 1, 1)
    async with peer(gateway, request(f"/ws/device/?token={gateway.token}", header)) as client:
        answer = await client.answer()
        if expected == "500":
            assert (answer.status, answer.body) == (500, b'{"error":"internal"}')
        else:
            assert await client.hear() == (Opcode.CLOSE, (4000).to_bytes(2, "big"))
    assert gateway.running.instance.metrics.refused == {"internal": 1}
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 1


# Messages and their answers.

WEATHER = {"now": {"temp": "25", "text": "晴", "icon": "100"}, "updateTime": "2023-01-01T12:00:00Z"}


def said(kind: str, text: object = None, **data: object) -> dict[str, Any]:
    """An answer with data, and a message where it has one."""
    return {"type": f"{kind}_response", "data": data} | ({"message": text} if text else {})


def sample(city: str) -> dict[str, Any]:
    return said("weather", city={"name": city}, weather=WEATHER, sample=True)


def song(name: str, artist: str) -> dict[str, Any]:
    text = f"开始播放:{name} - {artist}"
    return said("sing", text, song=name, artist=artist, action="start_singing")


def dancing(dance: str, style: str, duration: str = "30秒") -> dict[str, Any]:
    text = f"开始跳舞:{dance} ({style})"
    return said("dance", text, dance=dance, style=style, duration=duration, action="start_dancing")


ANSWERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        (PING | extra, {"type": "pong"})
        for extra in (
            {}, {"message": {}}, {"message": None}, {"message": "x"}, {"message": [1, 2.5]},
            {"message": 2**63}, {"unknown": 1}, {"_reserved": 1},
        )
    ),
    *(
        (PING | {"timestamp": sent_at}, {"type": "pong"})
        for sent_at in (
            None, "2026-11-22T22:16:44.524210+00:00", "2026-11-22T22:16:44.524+08:00",
            "2026-11-22T22:16:44.524Z", "2026-11-22T22:16:44Z", "2026-11-22T22:16:44",
            "2026-11-22T22:16:44.524210", "2026-11-22 22:16:44",
        )
    ),
    (
        {"type": "chat_message", "message": "你好 \N{GRINNING FACE}"},
        {"type": "chat_response", "message": "收到消息:你好 \N{GRINNING FACE}"},
    ),
    ({"type": "chat_message", "message": ""}, {"type": "chat_response", "message": "收到消息:"}),
    (
        {"type": "chat_message", "message": "a\0b"},
        {"type": "chat_response", "message": "收到消息:a\0b"},
    ),
    ({"type": "weather", "message": {"city": "上海"}}, sample("上海")),
    ({"type": "weather", "message": {}}, sample("北京")),
    ({"type": "weather"}, sample("北京")),
    ({"type": "sing", "message": {"song": "青花瓷", "artist": "周杰伦"}}, song("青花瓷", "周杰伦")),
    ({"type": "sing", "message": {"song": "x", "more": 1}}, song("x", "")),
    ({"type": "sing", "message": {}}, song("", "")),
    ({"type": "sing"}, song("", "")),
    (
        {"type": "dance", "message": {"dance": "街舞", "style": "hip-hop", "duration": "1分"}},
        dancing("街舞", "hip-hop", "1分"),
    ),
    ({"type": "dance", "message": {"dance": "街舞"}}, dancing("街舞", "")),
    ({"type": "dance"}, dancing("", "")),
]  # fmt: skip


@pytest.mark.parametrize(("message", "expected"), ANSWERS)
async def test_messages_are_answered(
    gateway: Instance, message: dict[str, Any], expected: dict[str, Any]
) -> None:
    async with gateway.device() as device:
        assert untimed(await ask(device, message)) == expected


async def test_answers_are_not_escaped(gateway: Instance) -> None:
    async with gateway.device() as device:
        await device.send('{"type":"chat_message","message":"\\u4f60"}')
        assert "收到消息:你" in str(await device.recv())


OWN: dict[str, Any] = {"handlers__modules": [__name__], "handlers__timeout": 0.2}
"""With the types of this module."""


async def test_types_of_ones_own_are_answered_as_their_handlers_say(accounts: Accounts) -> None:
    async with running_gateway(accounts, **OWN) as gateway, gateway.device() as device:
        answer = await ask(device, {"type": "light", "message": {"on": True}})
        assert untimed(answer) == {"type": "light_response", "on": True, "level": 100, "user": 1}
        await device.send('{"type":"quiet"}')
        assert untimed(await ask(device, {"type": "count", "message": 2**63})) == {
            "type": "counted",
            "count": 2**63,
        }
        assert await ask(device, {"type": "shout", "message": "hi"}) == {"type": "whisper"}
        heard = [orjson.loads(await device.recv()) for _ in range(2)]
        assert {"type": "shouted", "message": "hi"} in heard
        assert [one["matched"] for one in heard if one["type"] == "shout_response"] == [1]


class BrokenWeather:
    """A weather provider without weather."""

    async def current(self, city: str) -> dict[str, Any]:
        raise ServiceError(f"no city {city}")


class HangingWeather:
    """A weather provider that never answers."""

    async def current(self, city: str) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError


class BrokenChat:
    """A chat provider that has nothing to say."""

    async def reply(self, text: str, **_: Any) -> str:
        raise ServiceError("no model")


async def test_the_device_is_told_why_a_provider_failed(gateway: Instance) -> None:
    gateway.running.instance.listener.services = Services(BrokenWeather(), BrokenChat())
    async with gateway.device() as device:
        answer = await ask(device, {"type": "weather", "message": {"city": "上海"}})
        assert untimed(answer) == error("Weather query failed: no city 上海", "SERVICE_ERROR")
        answer = await ask(device, {"type": "chat_message", "message": "hi"})
        assert untimed(answer) == error("no model", "SERVICE_ERROR")


async def test_the_device_is_told_that_a_provider_timed_out(accounts: Accounts) -> None:
    async with running_gateway(accounts, handlers__timeout=0.2) as gateway:
        gateway.running.instance.listener.services = Services(HangingWeather(), BrokenChat())
        async with gateway.device() as device:
            answer = untimed(await ask(device, {"type": "weather"}))
            assert answer["code"] == "SERVICE_ERROR"
            assert answer["message"].startswith("Weather query failed: ")


# Errors, in the order in which they are looked for.


def invalid(errors: dict[str, list[str]]) -> tuple[str, str]:
    return f"Message validation error: {orjson.dumps(errors).decode()}", "VALIDATION_ERROR"


TOO_LARGE = ("Message too large", "MESSAGE_TOO_LARGE")
NO_JSON = ("Invalid JSON format", "INVALID_JSON")
NO_TEXT = ("Binary messages are not supported", "UNSUPPORTED_DATA")
NO_TYPE = invalid({"type": ["Missing data for required field."]})
TYPE_NO_TEXT = invalid({"type": ["Not a valid string."]})
NO_TIME = invalid({"timestamp": ["Not a valid datetime."]})
NO_OBJECT = invalid({"_schema": ["Invalid input type."]})


def nested(depth: int) -> str:
    """A ping whose deepest list is at that depth."""
    return '{"type":"ping","message":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


ERRORS: list[tuple[str, str | bytes, tuple[str, str]]] = [
    ("long", "x" * 10_241, TOO_LARGE),
    ("long in characters", "鱼" * 10_241, TOO_LARGE),
    ("as long as may be", "x" * 65_536, TOO_LARGE),
    ("binary", b'{"type":"ping"}', NO_TEXT),
    ("empty binary", b"", NO_TEXT),
    ("long enough", "x" * 10_240, NO_JSON),
    ("empty", "", NO_JSON),
    ("blank", " ", NO_JSON),
    ("cut off", '{"type":"ping"', NO_JSON),
    ("more behind it", '{"type":"ping"}{}', NO_JSON),
    ("not a number", '{"type":"ping","message":NaN}', NO_JSON),
    ("half a character", '{"type":"chat_message","message":"\\ud83d"}', NO_JSON),
    ("byte order mark", "\ufeff" + '{"type":"ping"}', NO_JSON),
    ("deep", nested(33), NO_JSON),
    ("null", "null", NO_OBJECT),
    ("list", "[]", NO_OBJECT),
    ("text", '"ping"', NO_OBJECT),
    ("number", "1", NO_OBJECT),
    ("no type", '{"message":"ping"}', NO_TYPE),
    ("type null", '{"type":null}', TYPE_NO_TEXT),
    ("type number", '{"type":1}', TYPE_NO_TEXT),
    ("type list", '{"type":["ping"]}', TYPE_NO_TEXT),
    *(
        (f"time {at}", f'{{"type":"ping","timestamp":{at}}}', NO_TIME)
        for at in (
            '""', '"yesterday"', "0", "1.5", "true", "[]", "{}", '"2026-11-22"',
            '"2026-13-01T00:00:00Z"', '"2026-11-22T25:00:00Z"',
        )
    ),
    (
        "no message", '{"type":"chat_message"}',
        invalid({"message": ["Missing data for required field."]}),
    ),
    ("chat null", '{"type":"chat_message","message":null}',
     invalid({"message": ["Expected `str`, got `null`"]})),
    ("chat 2^64", '{"type":"chat_message","message":18446744073709551616}',
     invalid({"message": ["Expected `str`, got `float`"]})),
    ("weather text", '{"type":"weather","message":"上海"}',
     invalid({"message": ["Expected `object`, got `str`"]})),
    ("weather null", '{"type":"weather","message":null}',
     invalid({"message": ["Expected `object`, got `null`"]})),
    ("city number", '{"type":"weather","message":{"city":1}}',
     invalid({"message.city": ["Expected `str`, got `int`"]})),
    ("song null", '{"type":"sing","message":{"song":null}}',
     invalid({"message.song": ["Expected `str`, got `null`"]})),
    ("count 2^64", '{"type":"count","message":18446744073709551616}',
     invalid({"message": ["Expected `int`, got `float`"]})),
    ("blamed", '{"type":"blames"}', invalid({"message.level": ["Too bright."]})),
    ("unknown", '{"type":"nope"}', ("Unsupported message type: nope", "UNSUPPORTED_TYPE")),
    ("empty type", '{"type":""}', ("Unsupported message type: ", "UNSUPPORTED_TYPE")),
    ("long type", '{"type":"' + "鱼" * 65 + '"}',
     ("Unsupported message type: " + "鱼" * 64, "UNSUPPORTED_TYPE")),
    ("service", '{"type":"no_service"}', ("the service is closed", "SERVICE_ERROR")),
    ("raises", '{"type":"raises"}', ("Internal server error", "INTERNAL_ERROR")),
    ("raises later", '{"type":"raises_later"}', ("Internal server error", "INTERNAL_ERROR")),
    ("unsayable", '{"type":"unsayable"}', ("Internal server error", "INTERNAL_ERROR")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "expected"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS]
)
async def test_a_message_that_cannot_be_answered_gets_an_error_and_the_device_stays(
    accounts: Accounts, message: str | bytes, expected: tuple[str, str]
) -> None:
    async with running_gateway(accounts, **OWN) as gateway, gateway.device() as device:
        assert untimed(await ask(device, message)) == error(*expected)
        assert untimed(await ask(device, PING)) == {"type": "pong"}
        assert gateway.running.instance.metrics.errors == {expected[1]: 1}


async def test_a_handler_that_never_answers_is_given_up(accounts: Accounts) -> None:
    async with running_gateway(accounts, **OWN) as gateway, gateway.device() as device:
        answer = await ask(device, {"type": "never"})
        assert untimed(answer)["code"] == "SERVICE_ERROR"
        assert untimed(await ask(device, PING)) == {"type": "pong"}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("[" * 10_241, "MESSAGE_TOO_LARGE"),
        ("[" * 33 + "]" * 33, "INVALID_JSON"),
        ('{"type":1,"message":NaN}', "INVALID_JSON"),
        ('{"type":"nope","timestamp":0}', "VALIDATION_ERROR"),
        ('{"type":"nope","message":1}', "UNSUPPORTED_TYPE"),
        ('{"type":"raises_later","timestamp":0}', "VALIDATION_ERROR"),
    ],
)
async def test_of_several_faults_the_first_in_the_order_is_told(
    accounts: Accounts, message: str, code: str
) -> None:
    async with running_gateway(accounts, **OWN) as gateway, gateway.device() as device:
        assert untimed(await ask(device, message))["code"] == code


@pytest.mark.parametrize("text", ["鱼", "\N{GRINNING FACE}"])
async def test_characters_are_counted_and_not_bytes(gateway: Instance, text: str) -> None:
    envelope = '{"type":"chat_message","message":""}'
    longest = text * (10_240 - len(envelope))
    async with gateway.device() as device:
        answer = await ask(device, {"type": "chat_message", "message": longest})
        assert answer["message"] == f"收到消息:{longest}"
        answer = await ask(device, {"type": "chat_message", "message": longest + "x"})
        assert untimed(answer) == error(*TOO_LARGE)


@pytest.mark.parametrize("message", ["{}", "x" * 10_241, b"binary", "x" * 65_536])
async def test_the_rate_comes_before_any_other_fault(
    accounts: Accounts, message: str | bytes
) -> None:
    async with running_gateway(accounts, limits__messages=1) as gateway, gateway.device() as device:
        await ask(device, message)
        answer = await ask(device, message)
        assert untimed(answer) == error("Rate limit exceeded", "RATE_LIMITED")
        assert await close_code(device) == 4008


# How connections end.


async def test_more_messages_than_allowed_end_in_4008_and_a_reconnect_wins_nothing(
    accounts: Accounts,
) -> None:
    other = await accounts.add_token()
    async with running_gateway(accounts, limits__messages=3) as gateway:
        async with gateway.device() as device:
            for _ in range(3):
                assert untimed(await ask(device, PING)) == {"type": "pong"}
            answer = await ask(device, PING)
            assert untimed(answer) == error("Rate limit exceeded", "RATE_LIMITED")
            assert await close_code(device) == 4008
        await eventually(lambda: gateway.running.instance.listener.connections == 0)
        for header in ("X: y", VERSIONED):
            answer = await fetch(gateway, request(f"/ws/device/?token={gateway.token}", header))
            assert (answer.status, answer.body) == (503, UNAVAILABLE)
            assert 30 <= int(answer.headers["retry-after"]) <= 60
        assert gateway.running.instance.metrics.refused == {"rate": 2}
        async with gateway.device(other) as device:
            assert untimed(await ask(device, PING)) == {"type": "pong"}


async def test_a_reconnect_inherits_what_was_used_and_no_more(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__messages=4) as gateway:
        for _ in range(3):
            async with gateway.device() as device:
                await ask(device, PING)
            await eventually(lambda: gateway.running.instance.listener.connections == 0)
        async with gateway.device() as device:
            assert untimed(await ask(device, PING)) == {"type": "pong"}
            assert (await ask(device, PING))["code"] == "RATE_LIMITED"


async def test_a_device_may_come_back_when_it_was_told_to(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__messages=1, limits__window=1) as gateway:
        async with gateway.device() as device:
            await ask(device, PING)
        await eventually(lambda: gateway.running.instance.listener.connections == 0)
        refused = request(f"/ws/device/?token={gateway.token}")
        async with asyncio.timeout(10):
            while (code := await outcome(gateway, refused)) == "503":
                pass
        assert code == "1"
        assert gateway.running.instance.metrics.refused["rate"] > 0


async def test_protocol_pings_are_answered_and_no_messages(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__messages=1) as gateway, gateway.device() as device:
        for _ in range(5):
            await (await device.ping(b"still there?"))
        assert untimed(await ask(device, PING)) == {"type": "pong"}


MALFORMED = [
    ("unmasked", b"\x81\x02{}", 1002),
    ("not UTF-8", frame(b"\xff"), 1007),
    ("too long", frame(b"x" * 65_537), 1009),
]


@pytest.mark.parametrize(
    ("sent", "code"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
async def test_frames_that_break_the_rfc_end_the_connection(
    gateway: Instance, sent: bytes, code: int
) -> None:
    async with peer(gateway, upgraded=True) as device:
        device.send(sent, frame(PING))
        (last,) = await device.hear_rest()
        assert last.code == code


@pytest.mark.parametrize("interval", [0.1, 0.3])
async def test_a_device_that_does_not_answer_a_ping_is_closed_with_1011(
    accounts: Accounts, interval: float
) -> None:
    async with (
        running_gateway(
            accounts,
            keepalive__interval=interval,
            keepalive__timeout=0.3,
            keepalive__close_timeout=0.3,
        ) as gateway,
        gateway.device() as alive,
        peer(gateway, upgraded=True) as device,
    ):
        *pings, last = await device.hear_rest()
        assert 1 <= len(pings) <= round(0.3 / interval)
        assert set(pings) == {(Opcode.PING, b"")}
        assert last.code == 1011
        assert untimed(await ask(alive, PING)) == {"type": "pong"}


@pytest.mark.parametrize(
    "sign",
    [frame(PING), frame(b"", Opcode.PONG), frame(b"", Opcode.PING), frame(b"x")[:1]],
    ids=["message", "pong", "ping", "half a frame"],
)
async def test_any_bytes_are_a_sign_of_life(accounts: Accounts, sign: bytes) -> None:
    async with (
        running_gateway(accounts, keepalive__interval=0.2, keepalive__timeout=0.2) as gateway,
        peer(gateway, upgraded=True) as device,
    ):
        heard = 0
        rest = iter(frame({"type": "ping", "message": "x" * 50}))
        while heard < 4:
            one = await device.hear()
            assert one.opcode != Opcode.CLOSE
            if one.opcode == Opcode.PING:
                heard += 1
                device.send(bytes([next(rest)]) if len(sign) == 1 else sign)


async def test_a_drain_tells_every_device_when_to_come_back(gateway: Instance) -> None:
    async with gateway.device() as one, gateway.device() as two:
        gateway.stop.set()
        for device in (one, two):
            received = (await close_of(device)).rcvd
            assert received is not None
            assert received.code == 1012
            hint = orjson.loads(received.reason)
            assert list(hint) == ["retry_ms"]
            assert 0 <= hint["retry_ms"] <= 10_000
    await gateway.task


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE tokens SET revoked_at = 1 WHERE id = 2",
        "UPDATE tokens SET expires_at = 1 WHERE id = 2",
        "UPDATE tokens SET scope = 'api' WHERE id = 2",
        "UPDATE users SET active = 0 WHERE id = 2",
        "DELETE FROM tokens WHERE id = 2",
    ],
    ids=["revoked", "expired", "scope", "disabled", "deleted"],
)
@pytest.mark.parametrize("subprotocols", [None, ["wsgateway.v1"]], ids=["plain", "versioned"])
async def test_a_token_that_ends_while_connected_closes_with_4001(
    gateway: Instance, accounts: Accounts, change: str, subprotocols: Any
) -> None:
    user, _ = await accounts.add_user("bob")
    token = await accounts.add_token(user)
    async with gateway.device() as other, gateway.device(token, subprotocols=subprotocols) as bob:
        accounts.execute(change)
        assert await close_code(bob) == 4001
        assert await outcome(gateway, request(f"/ws/device/?token={token}")) == "403"
        assert untimed(await ask(other, PING)) == {"type": "pong"}


async def test_a_token_that_expires_while_connected_closes_with_4001(accounts: Accounts) -> None:
    token = await accounts.add_token(expires_at=int(time.time()) + 2)
    async with running_gateway(accounts, keepalive__interval=0.2) as gateway:
        async with gateway.device(token) as device:
            assert await close_code(device) == 4001
        assert await outcome(gateway, request(f"/ws/device/?token={token}")) == "403"


async def test_with_newest_a_device_replaces_its_older_connection(accounts: Accounts) -> None:
    other = await accounts.add_token()
    async with (
        running_gateway(accounts, limits__duplicate="newest") as gateway,
        gateway.device() as older,
        gateway.device(other) as newer,
    ):
        assert await close_code(older) == 4010
        assert untimed(await ask(newer, PING)) == {"type": "pong"}


async def test_with_newest_a_token_without_device_replaces_only_itself(accounts: Accounts) -> None:
    user, _ = await accounts.add_user("bob")
    one, two = [await accounts.add_token(user) for _ in range(2)]
    async with (
        running_gateway(accounts, limits__duplicate="newest") as gateway,
        gateway.device(one) as older,
        gateway.device(two) as stranger,
        gateway.device(one) as newer,
    ):
        assert await close_code(older) == 4010
        for device in (stranger, newer):
            assert untimed(await ask(device, PING)) == {"type": "pong"}


async def test_by_default_a_device_may_connect_twice(gateway: Instance) -> None:
    async with gateway.device() as older, gateway.device() as newer:
        for device in (older, newer):
            assert untimed(await ask(device, PING)) == {"type": "pong"}


async def test_a_reader_that_is_too_slow_sees_1006(accounts: Accounts) -> None:
    async with (
        running_gateway(accounts, limits__outbound_bytes=65_536) as gateway,
        gateway.device(max_queue=1) as slow,
    ):
        message = {"type": "note", "message": "x" * 30_000}
        while gateway.running.instance.metrics.aborted["slow"] == 0:
            await gateway.running.instance.gateway.to_all(message)
            await asyncio.sleep(0)
        assert await close_code(slow) is None
        assert gateway.running.instance.metrics.closed == {"1006": 1}


@pytest.mark.parametrize(
    "said", [b"", b"\x03\xe8", b"\x03\xe8bye", b"\x03\xe9", b"\x0b\xb8later", b"\x13\x87"]
)
async def test_a_devices_close_is_echoed(gateway: Instance, said: bytes) -> None:
    async with peer(gateway, upgraded=True) as device:
        device.send(frame(said, Opcode.CLOSE))
        assert await device.hear_rest() == [(Opcode.CLOSE, said)]
    await eventually(lambda: gateway.running.instance.listener.connections == 0)
    assert gateway.running.instance.metrics.aborted == {}
