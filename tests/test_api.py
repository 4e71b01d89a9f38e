"""The HTTP API on one instance: every call's answer, who may call, and what bad callers are told.

Backends are aiohttp sessions, or bare sockets for what a session would not send; devices are real
connections. Every answer that passes through here is held to the one shape that answers have.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson
import pytest
from aiohttp import ClientSession, TCPConnector
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from tests.conftest import Accounts, Instance, ask, running_gateway
from wsgateway import __version__
from wsgateway.api import answers, listener
from wsgateway.api.people import make_cursor, read_cursor
from wsgateway.api.problems import Problem
from wsgateway.api.routes import ROUTES

ADMIN = "the-key-of-an-operator"
API = "the-key-of-a-backend"
KEYS = [
    {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scope": scope}
    for name, key, scope in (("operator", ADMIN, "admin"), ("backend", API, "api"))
]
UNTOLD = ("Traceback", 'File "', "wsg_", ADMIN, API, "orjson", "msgspec", "sqlite", "aiohttp")
"""What no error may contain: exceptions, names of libraries, keys."""

CHAT = {"type": "chat", "message": {"text": "你好"}, "user_id": 1}


@dataclass
class Reply:
    """An answer of the API, in the shape that every answer has."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def data(self) -> Any:
        assert self.status == 200, self.body
        return self.body["data"]

    @property
    def told(self) -> tuple[int, str, str | None]:
        """Status, code and field of a failure."""
        return self.status, self.body.get("code", ""), self.body.get("field")


def checked(status: int, headers: Mapping[str, str], raw: bytes) -> Reply:
    """An answer, if it has the shape of one."""
    assert headers["Content-Type"] == "application/json", raw
    assert headers["Wsgateway-Instance"] == "here"
    body = orjson.loads(raw)
    if status == 200:
        assert body["status"] == "success"
    else:
        assert (
            {"status", "message", "code"} <= body.keys() <= {"status", "message", "code", "field"}
        )
        assert body["status"] == "error"
        assert all(isinstance(value, str) and value for value in body.values())
        assert not [word for word in UNTOLD if word in raw.decode()], raw
    return Reply(status, headers, body)


@dataclass
class Backend:
    """A program that calls a gateway."""

    instance: Instance
    session: ClientSession
    accounts: Accounts

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = ADMIN,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Call; bytes are sent as they are, anything else as JSON."""
        sent = dict(headers or {})
        if key is not None:
            sent["X-API-Key"] = key
        data = body if isinstance(body, bytes) else None
        if body is not None:
            data = data if data is not None else orjson.dumps(body)
            sent.setdefault("Content-Type", "application/json")
        async with self.session.request(method, path, data=data, headers=sent) as answer:
            return checked(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: object = None, **options: Any) -> Reply:
        return await self.call("POST", path, body, **options)

    async def delete(self, path: str, **options: Any) -> Reply:
        return await self.call("DELETE", path, **options)

    async def until(self, told: Callable[[Reply], object], method: str, path: str) -> Reply:
        """Call again and again until the answer is as expected."""
        async with asyncio.timeout(10):
            while not told(reply := await self.call(method, path)):
                pass
            return reply


@contextlib.asynccontextmanager
async def calling(accounts: Accounts, **overrides: object) -> AsyncIterator[Backend]:
    """A gateway with two keys in its configuration, and a backend that calls it."""
    async with (
        running_gateway(accounts, api__keys=KEYS, **overrides) as instance,
        ClientSession(instance.api_url, connector=TCPConnector(limit=0)) as session,
    ):
        yield Backend(instance, session, accounts)


@pytest.fixture
async def backend(accounts: Accounts) -> AsyncIterator[Backend]:
    async with calling(accounts) as made:
        yield made


async def received(device: ClientConnection) -> dict[str, Any]:
    """The next message of a device."""
    async with asyncio.timeout(10):
        message: dict[str, Any] = orjson.loads(await device.recv())
        return message


async def got_nothing(device: ClientConnection) -> bool:
    """Whether nothing is on its way: what was sent before would come before the pong."""
    return (await ask(device, {"type": "ping"}))["type"] == "pong"


async def close_of(device: ClientConnection) -> tuple[int, str]:
    """Code and reason with which the gateway closes a connection."""
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionClosedError) as closed:
            await device.recv()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


def receipt(matched: int, **more: int) -> dict[str, Any]:
    """A receipt of one instance that reached everybody, without its id."""
    return {
        "matched": matched,
        "written": matched,
        "dropped": 0,
        "instances": {"here": matched},
        "complete": True,
        "online": matched > 0,
        **more,
    }


def receipt_of(reply: Reply) -> dict[str, Any]:
    """A receipt without its id, which is checked."""
    delivery = dict(reply.body["delivery"])
    assert re.fullmatch(r"[\w-]{8,64}", delivery.pop("id"))
    return delivery


# Bare sockets.


def request(
    body: bytes = b"",
    *headers: str,
    start: str = "POST /api/messages",
    length: int | str | None = None,
) -> bytes:
    """The bytes of a request; ``length`` is what it claims, if not the truth."""
    claimed = len(body) if length is None else length
    lines = [f"{start} HTTP/1.1", "Host: x", f"X-API-Key: {ADMIN}", *headers]
    if claimed != "":
        lines.append(f"Content-Length: {claimed}")
    if not any(line.startswith("Content-Type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def socket_to(
    instance: Instance,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to the API."""
    assert instance.running.api_address is not None
    reader, writer = await asyncio.open_connection(*instance.running.api_address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """The next answer on a bare connection."""
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        raw = await reader.readexactly(int(headers["Content-Length"]))
    return checked(int(head[0].split()[1]), headers, raw)


# Sends.

SENDS = {
    "seed": ("/api/messages", {"user_id": 1}, {}, {}),
    "id in digits": ("/api/messages", {"user_id": "1"}, {}, {}),
    "user": ("/api/users/1/messages", {}, {"sender": "backend"}, {}),
    "device": ("/api/devices/1/messages", {}, {}, {}),
    "broadcast": ("/api/broadcast", {}, {}, {"users": 1}),
}


@pytest.mark.parametrize(("path", "target", "told", "counted"), SENDS.values(), ids=SENDS)
async def test_a_send_reaches_the_device_and_answers_with_what_was_sent_and_a_receipt(
    backend: Backend,
    path: str,
    target: dict[str, Any],
    told: dict[str, str],
    counted: dict[str, int],
) -> None:
    async with backend.instance.device() as device:
        reply = await backend.post(path, {"type": "chat", "message": "你好", **target}, key=API)
        message = await received(device)
        assert reply.body.keys() == {"status", "message", "data", "delivery"}
        assert reply.body["message"] == "消息发送成功"
        assert reply.data == message
        assert datetime.fromisoformat(message.pop("timestamp")).tzinfo == UTC
        assert message == {"type": "chat", "message": "你好", **told}
        assert receipt_of(reply) == receipt(1, **counted)


@pytest.mark.parametrize(
    "path", ["/api/users/1/messages", "/api/devices/1/messages", "/api/broadcast"]
)
async def test_a_notice_without_a_type_is_a_system_message(backend: Backend, path: str) -> None:
    assert (await backend.post(path, {"message": 1})).data["type"] == "system"


async def test_the_sender_of_a_message_is_the_owner_of_the_token_that_sent_it(
    backend: Backend,
) -> None:
    await backend.accounts.add_user("大卫")
    key = await backend.accounts.add_token(2, scope="api")
    reply = await backend.post("/api/users/1/messages", {"message": "x"}, key=key)
    assert reply.data["sender"] == "大卫"


MESSAGES = [{}, "", 0, None, False, [], 1.5, 2**63, "\u2028\x00😀", {"user_id": 7, "type": 1}]


async def test_a_message_may_be_any_json(backend: Backend) -> None:
    async with backend.instance.device() as device:
        for message in MESSAGES:
            reply = await backend.post("/api/messages", {**CHAT, "message": message})
            assert reply.data["message"] == message
            assert (await received(device))["message"] == message


async def test_a_send_reaches_all_connections_of_whom_it_is_for_and_nobody_else(
    backend: Backend,
) -> None:
    bob, bobs_device = await backend.accounts.add_user("bob", "lamp")
    bobs = await backend.accounts.add_token(bob)
    device = backend.instance.device
    async with device() as one, device() as two, device(bobs) as other:
        for path, matched, users in (
            ("/api/users/1/messages", 2, {}),
            (f"/api/users/{bob}/messages", 1, {}),
            ("/api/devices/1/messages", 2, {}),
            (f"/api/devices/{bobs_device}/messages", 1, {}),
            ("/api/broadcast", 3, {"users": 2}),
        ):
            reply = await backend.post(path, {"message": path})
            assert receipt_of(reply) == receipt(matched, **users)
            for each in (one, two, other):
                if matched == 3 or (each is other) == (matched == 1):
                    assert (await received(each))["message"] == path
        for each in (one, two, other):
            assert await got_nothing(each)


async def test_a_user_and_a_device_may_have_the_same_number_and_are_told_apart(
    backend: Backend,
) -> None:
    bob, _ = await backend.accounts.add_user("bob")
    await backend.accounts.add_user("carol", "lamp")
    async with backend.instance.device(await backend.accounts.add_token(bob)) as device:
        assert bob == 2
        assert receipt_of(await backend.post("/api/devices/2/messages", {"message": 1})) == receipt(
            0
        )
        assert await got_nothing(device)


@pytest.mark.parametrize("path", ["/api/messages", "/api/users/1/messages", "/api/broadcast"])
@pytest.mark.parametrize("query", ["", "?timeout=0", "?timeout=30", "?wait=none", "?wait=all"])
async def test_nobody_online_is_a_success_with_an_honest_receipt(
    backend: Backend, path: str, query: str
) -> None:
    users = {"users": 0} if path == "/api/broadcast" else {}
    body = CHAT if path == "/api/messages" else {"message": 1}
    assert receipt_of(await backend.post(path + query, body)) == receipt(0, **users)


async def test_who_requires_somebody_online_is_told_when_nobody_is(backend: Backend) -> None:
    path = "/api/messages?require=online"
    assert (await backend.post(path, CHAT)).told == (404, "offline", None)
    async with backend.instance.device() as device:
        assert receipt_of(await backend.post(path, CHAT)) == receipt(1)
        assert (await received(device))["message"] == CHAT["message"]
        assert (await backend.post(f"{path}&wait=none", CHAT)).told == (*INVALID, "require")


async def test_sends_of_one_caller_arrive_in_order(backend: Backend) -> None:
    async with backend.instance.device() as device:
        for number in range(50):
            await backend.post("/api/messages", {**CHAT, "message": number})
        assert [(await received(device))["message"] for _ in range(50)] == list(range(50))


@pytest.mark.parametrize("requests", [2000, 2], ids=["room for all", "room for two"])
async def test_of_a_thousand_sends_at_once_the_device_gets_exactly_those_that_succeeded(
    accounts: Accounts, requests: int
) -> None:
    async with (
        calling(accounts, api__requests=requests) as backend,
        backend.instance.device() as device,
    ):

        async def send(number: int) -> tuple[int, Reply]:
            return number, await backend.post("/api/messages", {**CHAT, "message": number})

        sent = asyncio.gather(*map(send, range(1000)))
        last = asyncio.create_task(_read_until(device, "the end"))
        replies = await sent
        await backend.post("/api/messages", {**CHAT, "message": "the end"})
        numbers = await last
        statuses = {reply.status for _, reply in replies}
        assert statuses == ({200} if requests == 2000 else {200, 503})
        for _, reply in replies:
            if reply.status == 503:
                assert reply.told == (503, "unavailable", None)
                assert int(reply.headers["Retry-After"]) > 0
        assert sorted(numbers) == [number for number, reply in replies if reply.status == 200]


async def _read_until(device: ClientConnection, end: str) -> list[int]:
    found: list[Any] = []
    while (message := (await received(device))["message"]) != end:
        found.append(message)
    return found


# Batches.


async def test_a_batch_answers_each_send_in_order_with_what_the_single_call_would_say(
    backend: Backend,
) -> None:
    batch: list[dict[str, Any]] = [
        {"type": "a", "message": 0, "user_id": 1},
        {"type": "a", "message": 1, "user_id": 99},
        {"type": "a", "message": 2, "device_id": "1"},
        {"type": "a", "message": 3, "device_id": 99},
        {"type": "a", "message": 4, "broadcast": True},
        {"type": "a", "message": 5},
        {"type": "a", "message": 6, "user_id": 1, "device_id": 1},
        {"type": "a", "message": "x" * 70_000, "user_id": 1},
        {"type": "a", "message": 8, "user_id": 1},
    ]
    expected = [
        receipt(1),
        (404, "not_found", "user_id"),
        receipt(1),
        (404, "not_found", "device_id"),
        receipt(1, users=1),
        (400, "missing", "user_id"),
        (422, "invalid", "user_id"),
        (413, "too_large", None),
        receipt(1),
    ]
    async with backend.instance.device() as device:
        results = (await backend.post("/api/messages/batch", batch)).data["results"]
        told: list[Any] = []
        for result in results:
            status = result.pop("http_status", 200)
            reply = Reply(status, {}, result)
            told.append(receipt_of(reply) if status == 200 else reply.told)
            assert result["status"] == ("success" if status == 200 else "error")
        assert told == expected
        assert [(await received(device))["message"] for _ in range(4)] == [0, 2, 4, 8]
        assert await got_nothing(device)


async def test_a_batch_with_require_online_fails_send_by_send(backend: Backend) -> None:
    bob, _ = await backend.accounts.add_user("bob")
    batch = [{"type": "a", "message": 0, "user_id": user} for user in (bob, 1)]
    async with backend.instance.device() as device:
        reply = await backend.post("/api/messages/batch?require=online", batch)
        assert [one["status"] for one in reply.data["results"]] == ["error", "success"]
        assert reply.data["results"][0]["code"] == "offline"
        assert (await received(device))["message"] == 0


async def test_a_thousand_sends_fit_into_a_batch_and_arrive_in_order(backend: Backend) -> None:
    batch = [{"type": "a", "message": number, "user_id": 1} for number in range(1001)]
    async with backend.instance.device() as device:
        refused = await backend.post("/api/messages/batch", batch)
        assert refused.told == (422, "invalid", "body")
        results = (await backend.post("/api/messages/batch", batch[:1000])).data["results"]
        assert [result["data"]["message"] for result in results] == list(range(1000))
        assert len({result["delivery"]["id"] for result in results}) == 1000
        assert [(await received(device))["message"] for _ in range(1000)] == list(range(1000))
        assert await got_nothing(device)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ([], (422, "invalid", "body")),
        ({}, (422, "invalid", "body")),
        (None, (422, "invalid", "body")),
        ([CHAT, 5], (422, "invalid", "[1]")),
        ([CHAT, {**CHAT, "type": 5}], (422, "invalid", "[1].type")),
        ([CHAT, {"type": "a"}], (400, "missing", "message")),
    ],
    ids=["empty", "object", "null", "number inside", "wrong type inside", "missing inside"],
)
async def test_a_batch_that_cannot_be_read_sends_nothing(
    backend: Backend, body: object, told: tuple[int, str, str]
) -> None:
    async with backend.instance.device() as device:
        reply = await backend.post("/api/messages/batch", orjson.dumps(body))
        assert reply.told == told
        assert await got_nothing(device)


# Bad input.


def sent(**changed: object) -> bytes:
    """A send with some fields changed; None takes a field away."""
    return orjson.dumps({k: v for k, v in {**CHAT, **changed}.items() if v is not None})


def nested(depth: int) -> Any:
    """Arrays in arrays."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


MISSING, INVALID, MALFORMED = (400, "missing"), (422, "invalid"), (400, "malformed", None)

BAD_BODIES: dict[str, tuple[bytes, tuple[Any, ...]]] = {
    "no type": (sent(type=None), (*MISSING, "type")),
    "no message": (sent(message=None), (*MISSING, "message")),
    "no user": (sent(user_id=None), (*MISSING, "user_id")),
    "empty object": (b"{}", (*MISSING, "type")),
    "empty body": (b"", (*MISSING, "type")),
    "null type": (b'{"type":null,"message":1,"user_id":1}', (*INVALID, "type")),
    "null user": (b'{"type":"a","message":1,"user_id":null}', (*INVALID, "user_id")),
    "null id": (b'{"type":"a","message":1,"user_id":1,"id":null}', (*INVALID, "id")),
    "type a number": (sent(type=5), (*INVALID, "type")),
    "type empty": (sent(type=""), (*INVALID, "type")),
    "type of 65 characters": (sent(type="x" * 65), (*INVALID, "type")),
    "id empty": (sent(id=""), (*INVALID, "id")),
    "id of 129 characters": (sent(id="x" * 129), (*INVALID, "id")),
    "id a number": (sent(id=5), (*INVALID, "id")),
    "user true": (sent(user_id=True), (*INVALID, "user_id")),
    "user negative": (sent(user_id=-1), (*INVALID, "user_id")),
    "user 2^63": (sent(user_id=2**63), (*INVALID, "user_id")),
    "user 10^30": (
        b'{"type":"a","message":1,"user_id":1' + b"0" * 30 + b"}",
        (*INVALID, "user_id"),
    ),
    "user a half": (sent(user_id=1.5), (*INVALID, "user_id")),
    "user a word": (sent(user_id="alice"), (*INVALID, "user_id")),
    "user empty": (sent(user_id=""), (*INVALID, "user_id")),
    "user of 19 digits": (sent(user_id="1" * 19), (*INVALID, "user_id")),
    "user in foreign digits": (sent(user_id="١"), (*INVALID, "user_id")),
    "user signed": (sent(user_id="-1"), (*INVALID, "user_id")),
    "user a list": (sent(user_id=[1]), (*INVALID, "user_id")),
    "user 2^63-1, unknown": (sent(user_id=2**63 - 1), (404, "not_found", "user_id")),
    "user of 18 digits, unknown": (sent(user_id="9" * 18), (404, "not_found", "user_id")),
    "user unknown": (sent(user_id=99), (404, "not_found", "user_id")),
    "user 0, unknown": (sent(user_id=0), (404, "not_found", "user_id")),
    "a list": (b"[]", (*INVALID, "body")),
    "a text": (b'"x"', (*INVALID, "body")),
    "null": (b"null", (*INVALID, "body")),
    "no JSON": (b"type=a", MALFORMED),
    "cut JSON": (sent()[:-1], MALFORMED),
    "two JSON": (sent() + b"{}", MALFORMED),
    "NaN": (b'{"type":"a","message":NaN,"user_id":1}', MALFORMED),
    "invalid UTF-8": (b'{"type":"a","message":"\xff","user_id":1}', MALFORMED),
    "lone surrogate": (b'{"type":"a","message":"\\ud800","user_id":1}', MALFORMED),
    "a BOM": (b"\xef\xbb\xbf" + sent(), MALFORMED),
    "nested 33 deep": (sent(message=nested(32)), (*INVALID, "message")),
    "nested 250 deep": (sent(message=nested(250)), (*INVALID, "message")),
    "nested 500 deep": (
        b'{"type":"a","user_id":1,"message":' + b"[" * 500 + b"]" * 500 + b"}",
        (*INVALID, "message"),
    ),
    "nested 100,000 deep": (b"[" * 100_000, MALFORMED),
    "70 KB": (sent(message="x" * 70_000), (413, "too_large", None)),
    "70 KB in 24,000 characters": (sent(message="你" * 24_000), (413, "too_large", None)),
}


@pytest.mark.parametrize(("body", "told"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_bad_send_is_refused_with_the_field_and_nobody_gets_anything(
    backend: Backend, body: bytes, told: tuple[Any, ...]
) -> None:
    async with backend.instance.device() as device:
        reply = await backend.post("/api/messages", body)
        assert reply.told == told
        if told[1] == "missing":
            assert reply.body["message"] == "缺少必要参数"
        assert await got_nothing(device)


async def test_a_message_may_be_as_deep_and_as_long_as_the_limits_say(backend: Backend) -> None:
    for message in (nested(31), "x" * 65_000):
        assert (await backend.post("/api/messages", {**CHAT, "message": message})).status == 200


BAD_CALLS: dict[str, tuple[str, str, object, tuple[Any, ...]]] = {
    f"{method} {path} {body or ''}": (method, path, body, told)
    for method, path, body, told in (
        *(
            ("POST", f"/api/messages?{query}", CHAT, (*INVALID, field))
            for field, queries in {
                "timeout": ("timeout=31", "timeout=-1", "timeout=nan", "timeout=x", "timeout="),
                "wait": ("wait=some", "wait="),
                "require": ("require=offline", "require="),
            }.items()
            for query in queries
        ),
        *(
            (
                "POST",
                f"/api/{path}/messages",
                {"message": 1},
                (404, "not_found", f"{path.split('s/')[0]}_id"),
            )
            for path in (
                *("users/99", "users/-1", "users/0", "users/alice", "users/%D9%A1", "users/1.0"),
                *(f"users/{2**63}", f"users/{'9' * 5000}", "devices/99", f"devices/{2**63}"),
            )
        ),
        ("POST", "/api/users/1/messages", {}, (*MISSING, "message")),
        ("POST", "/api/broadcast", {"type": "a"}, (*MISSING, "message")),
        ("POST", "/api/broadcast", {"message": 1, "type": ["a"]}, (*INVALID, "type")),
        *(
            ("GET", f"/api/{path}?{query}", None, (*INVALID, query.partition("=")[0]))
            for path in ("users/online", "connections", "tokens")
            for query in ("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=1.5", "cursor=")
        ),
        ("GET", "/api/connections?user=1", None, (*INVALID, "user")),
        ("GET", "/api/stats?x=1", None, (*INVALID, "x")),
        ("POST", "/api/broadcast?dry_run=1", {"message": 1}, (*INVALID, "dry_run")),
        ("GET", "/api/connections?user_id=x", None, (*INVALID, "user_id")),
        ("GET", "/api/connections?device_id=-1", None, (*INVALID, "device_id")),
        ("GET", f"/api/tokens?user_id={2**63}", None, (*INVALID, "user_id")),
        *(
            (method, path, None, (404, "not_found", field))
            for method, path, field in (
                ("GET", "/api/users/99", "user_id"),
                ("GET", "/api/devices/99", "device_id"),
                ("GET", "/api/users/x", "user_id"),
                ("DELETE", "/api/tokens/x", "token_id"),
                ("POST", "/api/users/99/disable", "user_id"),
                ("POST", "/api/users/99/enable", "user_id"),
            )
        ),
        *(
            (method, path, None, (404, "not_found", None))
            for method, path in (
                ("DELETE", "/api/connections/none"),
                ("DELETE", "/api/connections/%00%ff"),
                ("DELETE", "/api/tokens/99"),
                ("DELETE", "/api/tokens/0"),
                ("DELETE", f"/api/tokens/{'9' * 18}"),
                ("GET", "/api/nothing"),
                ("GET", "/api/messages/"),
                ("GET", "/api/users/../../etc/passwd"),
                ("GET", "/api/%2e%2e/%00"),
            )
        ),
        ("POST", "/api/users/1/disconnect", {"reason": 5}, (*INVALID, "reason")),
        ("POST", "/api/users/1/disconnect", {"reason": "x" * 101}, (*INVALID, "reason")),
        ("POST", "/api/tokens", {}, (*MISSING, "user_id")),
        ("POST", "/api/tokens", {"user_id": 99}, (404, "not_found", None)),
        ("POST", "/api/tokens", {"user_id": -1}, (*INVALID, "user_id")),
        ("POST", "/api/tokens", {"user_id": 2**63}, (*INVALID, "user_id")),
        ("POST", "/api/tokens", {"user_id": 1, "scope": "root"}, (*INVALID, "scope")),
        ("POST", "/api/tokens", {"user_id": 1, "device_id": 99}, (404, "not_found", None)),
        ("POST", "/api/tokens", {"user_id": 1, "device_id": "x"}, (*INVALID, "device_id")),
        ("POST", "/api/tokens", {"user_id": 1, "label": "x" * 101}, (*INVALID, "label")),
        ("POST", "/api/tokens", {"user_id": 1, "expires_in": 0}, (*INVALID, "expires_in")),
        ("POST", "/api/tokens", {"user_id": 1, "expires_in": 10**12}, (*INVALID, "expires_in")),
        ("POST", "/api/queue", {"user_id": 1}, (*MISSING, "message")),
        ("POST", "/api/queue", {"user_id": 1, "message": "x"}, (*INVALID, "message")),
    )
}


async def test_bad_calls_are_refused_with_the_field(backend: Backend) -> None:
    wrong = {}
    async with backend.instance.device() as device:
        for name, (method, path, body, told) in BAD_CALLS.items():
            reply = await backend.call(method, path, body)
            if reply.told != told:
                wrong[name[:80]] = (reply.told, told)
        assert await got_nothing(device)
    assert wrong == {}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
async def test_a_body_of_another_type_is_refused(backend: Backend, kind: str) -> None:
    async with socket_to(backend.instance) as (reader, writer):
        writer.write(request(sent(), f"Content-Type: {kind}"))
        assert (await read_reply(reader)).told == (415, "media_type", None)


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/json;charset=GBK"]
)
async def test_json_may_be_announced_with_parameters(backend: Backend, kind: str) -> None:
    reply = await backend.post("/api/messages", CHAT, headers={"Content-Type": kind})
    assert reply.status == 200


@pytest.mark.parametrize("length", [20_001, 10**12])
async def test_a_body_over_the_limit_is_refused_before_it_is_read(
    accounts: Accounts, length: int
) -> None:
    async with (
        calling(accounts, api__body_bytes=20_000) as backend,
        socket_to(backend.instance) as (reader, writer),
    ):
        writer.write(request(b'{"type"', length=length))
        assert (await read_reply(reader)).told == (413, "too_large", None)


async def test_a_body_of_exactly_the_limit_is_read(accounts: Accounts) -> None:
    async with calling(accounts, api__body_bytes=20_000) as backend:
        assert (await backend.post("/api/messages", sent().ljust(20_000))).status == 200
        assert (await backend.post("/api/messages", sent().ljust(20_001))).status == 413


async def test_what_follows_a_body_longer_than_it_claims_is_not_believed(backend: Backend) -> None:
    async with (
        backend.instance.device() as device,
        socket_to(backend.instance) as (reader, writer),
    ):
        writer.write(request(sent() + b"x" * 100_000, length=len(sent()) - 1))
        assert (await read_reply(reader)).told == MALFORMED
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert b" 200 " not in await reader.read()
        assert await got_nothing(device)


async def test_a_body_without_a_length_is_refused(backend: Backend) -> None:
    async with (
        backend.instance.device() as device,
        socket_to(backend.instance) as (reader, writer),
    ):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent()), sent())
        writer.write(request(body, "Transfer-Encoding: chunked", length=""))
        assert (await read_reply(reader)).told == (411, "length", None)
        assert await got_nothing(device)


async def test_a_body_that_does_not_arrive_in_time_is_given_up(accounts: Accounts) -> None:
    async with (
        calling(accounts, api__body_timeout=0.2) as backend,
        socket_to(backend.instance) as (reader, writer),
    ):
        writer.write(request(sent()[:10], length=len(sent())))
        assert (await read_reply(reader)).told == (408, "timeout", None)


BROKEN_REQUESTS = {
    "no HTTP": b"GARBAGE\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a header without a name": request(sent(), ": x"),
    "a header with a null": request(sent(), "X-Foo: a\x00b"),
    "a header of 20 KB": request(sent(), f"X-Foo: {'x' * 20_000}"),
    "a path of 20 KB": request(sent(), start=f"POST /{'x' * 20_000}"),
    "a length of a word": request(sent(), length="ten"),
    "a length of 30 digits": request(sent(), length=10**30),
    "a negative length": request(sent(), length="-5"),
    "two lengths": request(sent(), "Content-Length: 3"),
    "a length and chunks": request(sent(), "Transfer-Encoding: chunked"),
    "an unknown expectation": request(sent(), "Expect: miracles"),
    "no gzip": request(sent(), "Content-Encoding: gzip"),
    "no deflate": request(sent(), "Content-Encoding: deflate"),
}


@pytest.mark.parametrize("data", BROKEN_REQUESTS.values(), ids=BROKEN_REQUESTS)
async def test_a_request_that_is_broken_is_told_so_in_json_and_harms_nobody(
    backend: Backend, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        backend.instance.device() as device,
        socket_to(backend.instance) as (reader, writer),
    ):
        writer.write(data)
        assert 400 <= (await read_reply(reader)).status < 500
        assert await got_nothing(device)
        assert (await backend.get("/api/stats")).status == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_who_asks_whether_to_go_on_is_told(backend: Backend) -> None:
    async with socket_to(backend.instance) as (reader, writer):
        writer.write(request(b"", "Expect: 100-continue", length=len(sent())))
        async with asyncio.timeout(10):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(sent())
        assert (await read_reply(reader)).status == 200


@pytest.mark.parametrize(
    "data",
    [b"POST /api/mess", request(sent()[:10], length=len(sent())), request(sent(), length=10**6)],
    ids=["in the head", "in the body", "early in a long body"],
)
async def test_a_caller_who_hangs_up_in_the_middle_sends_nothing_and_leaves_nothing_behind(
    accounts: Accounts, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with calling(accounts, api__requests=1) as backend, backend.instance.device() as device:
        for _ in range(3):
            async with socket_to(backend.instance) as (_, writer):
                writer.write(data)
                await writer.drain()
        reply = await backend.until(lambda reply: reply.status == 200, "GET", "/api/stats")
        assert reply.data["connections"] == 1
        assert await got_nothing(device)
    assert [record for record in caplog.records if record.levelno >= 40] == []


async def test_the_message_of_a_caller_who_does_not_wait_for_the_answer_is_sent(
    backend: Backend,
) -> None:
    async with backend.instance.device() as device:
        async with socket_to(backend.instance) as (_, writer):
            writer.write(request(sent()))
            await writer.drain()
        assert (await received(device))["message"] == CHAT["message"]


async def test_requests_on_one_connection_are_answered_in_order(backend: Backend) -> None:
    async with (
        backend.instance.device() as device,
        socket_to(backend.instance) as (reader, writer),
    ):
        writer.write(b"".join(request(sent(message=number)) for number in range(20)))
        for number in range(20):
            assert (await read_reply(reader)).data["message"] == number
            assert (await received(device))["message"] == number


# Limits.


async def test_beyond_the_limit_requests_are_refused_at_once_and_told_when_to_come_back(
    accounts: Accounts,
) -> None:
    async with calling(accounts, api__requests=1) as backend:
        async with socket_to(backend.instance) as (reader, writer):
            writer.write(request(sent()[:10], length=len(sent())))
            busy = await backend.until(lambda reply: reply.status != 200, "GET", "/api/stats")
            assert busy.told == (503, "unavailable", None)
            assert int(busy.headers["Retry-After"]) > 0
            async with backend.session.get("/healthz") as health:
                assert health.status == 200
            writer.write(sent()[10:])
            assert (await read_reply(reader)).status == 200
        assert (await backend.get("/api/stats")).status == 200


async def test_beyond_the_limit_connections_are_closed_at_once(accounts: Accounts) -> None:
    async with calling(accounts, api__connections=2) as backend:
        assert (await backend.get("/api/stats")).status == 200
        async with socket_to(backend.instance) as (reader, writer):
            writer.write(request(start="GET /api/stats"))
            assert (await read_reply(reader)).status == 200
            async with socket_to(backend.instance) as (refused, _):
                async with asyncio.timeout(10):
                    assert await refused.read() == b""
        assert (await backend.get("/api/stats")).status == 200
        async with asyncio.timeout(10):
            while True:
                async with socket_to(backend.instance) as (reader, writer):
                    writer.write(request(start="GET /api/stats"))
                    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                        assert (await read_reply(reader)).status == 200
                        break


# Who may call.


@pytest.mark.parametrize("key", ["token", "configuration"])
@pytest.mark.parametrize(
    "header",
    ["Authorization: Token {}", "Authorization: Bearer {}", "authorization: bearer {}",
     "Authorization: TOKEN   {} ", "X-API-Key: {}", "x-api-key: {}"],
)  # fmt: skip
async def test_a_key_may_come_in_three_headers(backend: Backend, header: str, key: str) -> None:
    text = API if key == "configuration" else await backend.accounts.add_token(scope="api")
    name, value = header.format(text).split(": ", 1)
    assert (await backend.get("/api/stats", key=None, headers={name: value})).status == 200


async def test_a_foreign_scheme_does_not_hide_the_key_in_the_other_header(backend: Backend) -> None:
    reply = await backend.get("/api/stats", headers={"Authorization": "Basic YWxpY2U6eA=="})
    assert reply.status == 200


NO_KEYS = {
    "none": {},
    "empty": {"X-API-Key": ""},
    "blank": {"Authorization": "Token  "},
    "no scheme": {"Authorization": ADMIN},
    "another scheme": {"Authorization": f"Basic {ADMIN}"},
    "a cookie": {"Cookie": f"token={ADMIN}; key={ADMIN}; X-API-Key={ADMIN}"},
    "unknown": {"X-API-Key": "unknown"},
    "its hash": {"X-API-Key": hashlib.sha256(ADMIN.encode()).hexdigest()},
    "in capitals": {"X-API-Key": ADMIN.upper()},
    "cut": {"X-API-Key": ADMIN[:-1]},
    "very long": {"X-API-Key": "x" * 5000},
    "not ASCII": {"X-API-Key": "schlüssel"},
}


async def test_without_a_key_nothing_is_told(backend: Backend) -> None:
    for name, headers in NO_KEYS.items():
        reply = await backend.get("/api/stats", key=None, headers=headers)
        assert reply.told == (401, "unauthorized", None), name
    for query in ("token", "key", "api_key", "X-API-Key"):
        reply = await backend.get(f"/api/stats?{query}={ADMIN}", key=None)
        assert reply.told == (401, "unauthorized", None), query


async def test_a_key_of_bytes_that_are_no_text_is_no_key(backend: Backend) -> None:
    async with socket_to(backend.instance) as (reader, writer):
        bytes_ = request(start="GET /api/stats").replace(ADMIN.encode(), b"\xff\xfe\xed\xa0\x80")
        writer.write(bytes_)
        assert (await read_reply(reader)).told == (401, "unauthorized", None)


@pytest.mark.parametrize("why", ["expired", "revoked", "disabled", "deleted"])
async def test_a_key_that_has_ended_is_refused_as_an_unknown_one(
    backend: Backend, why: str
) -> None:
    expires_at = int(time.time()) + 2 if why == "expired" else None
    key = await backend.accounts.add_token(scope="api", expires_at=expires_at)
    assert (await backend.get("/api/stats", key=key)).status == 200
    change = {
        "expired": "UPDATE tokens SET expires_at = 1 WHERE scope = 'api'",
        "revoked": "UPDATE tokens SET revoked_at = unixepoch() WHERE scope = 'api'",
        "disabled": "UPDATE users SET active = 0",
        "deleted": "DELETE FROM tokens WHERE scope = 'api'",
    }
    backend.accounts.execute(change[why])
    async with asyncio.timeout(10):
        while (reply := await backend.get("/api/stats", key=key)).status == 200:
            pass
    unknown = await backend.get("/api/stats", key="unknown")
    assert (reply.status, reply.body) == (unknown.status, unknown.body) == (401, unknown.body)


async def test_a_key_expires_while_it_is_in_use(accounts: Accounts) -> None:
    key = await accounts.add_token(scope="api", expires_at=int(time.time()) + 2)
    async with calling(accounts, auth__poll_interval=5) as backend:
        assert (await backend.get("/api/stats", key=key)).status == 200
        async with asyncio.timeout(10):
            while (reply := await backend.get("/api/stats", key=key)).status == 200:
                await asyncio.sleep(0)
        assert reply.told == (401, "unauthorized", None)


async def test_each_call_asks_for_its_scope_and_who_has_less_changes_nothing(
    backend: Backend,
) -> None:
    api_token = await backend.accounts.add_token(scope="api")
    admin_token = await backend.accounts.add_token(scope="admin")
    assert listener.MODULES
    admin_calls = {route.path for route in ROUTES if route.scope == "admin"}
    assert admin_calls == {
        "/api/connections/{connection_id}",
        "/api/users/{user_id}/disconnect",
        "/api/devices/{device_id}/disconnect",
        "/api/users/{user_id}/disable",
        "/api/users/{user_id}/enable",
        "/api/tokens",
        "/api/tokens/{token_id}",
        "/api/queue",  # DELETE only
        "/api/reload",
    }
    async with backend.instance.device() as device:
        [row] = (await backend.get("/api/connections")).data["connections"]
        for route in ROUTES:
            path = re.sub(r"\{\w+\}", "1", route.path.replace("{connection_id}", row["id"]))
            for key in (backend.accounts.token, API, api_token, None):
                reply = await backend.call(
                    route.method, path, b"[]" if route.body else None, key=key
                )
                name = f"{route.method} {path}"
                if key is None:
                    assert reply.told == (401, "unauthorized", None), name
                elif key == backend.accounts.token or route.scope == "admin":
                    assert reply.told == (403, "forbidden", None), name
                else:
                    assert reply.status in (200, 422, 503), name
        assert await got_nothing(device)
    assert (await backend.get("/api/tokens", key=admin_token)).status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/messages", {"POST"}),
        ("PUT", "/api/messages", {"POST"}),
        ("OPTIONS", "/api/messages", {"POST"}),
        ("HEAD", "/api/stats", {"GET"}),
        ("DELETE", "/api/tokens", {"GET", "POST"}),
        ("PATCH", "/api/queue", {"GET", "POST", "DELETE"}),
        ("GET", "/api/connections/x", {"DELETE"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    backend: Backend, method: str, path: str, allowed: set[str]
) -> None:
    async with backend.session.request(method, path) as answer:
        raw = await answer.read()
        assert answer.status == 405
        assert set(answer.headers["Allow"].split(",")) == allowed
        if method != "HEAD":
            assert checked(405, answer.headers, raw).told == (405, "method", None)


# Without a key, and without a database.


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_is_told_without_a_key(backend: Backend, method: str) -> None:
    for path, body in (
        ("/healthz", {"status": "ok"}),
        ("/readyz", {"status": "ok", "reasons": []}),
    ):
        async with backend.session.request(method, path) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "application/json"
            raw = await answer.read()
            assert raw == b"" if method == "HEAD" else orjson.loads(raw) == body


async def test_without_a_database_tokens_are_refused_and_keys_of_the_configuration_go_on(
    backend: Backend,
) -> None:
    token = await backend.accounts.add_token(scope="admin")
    away = backend.accounts.path.with_suffix(".away")

    async def ready(key: str) -> int:
        return (await backend.get("/api/stats", key=key)).status

    async with backend.instance.device() as device:
        assert await ready(token) == 200
        backend.accounts.path.rename(away)
        async with asyncio.timeout(10):
            while await ready(token) == 200:
                pass
        reply = await backend.get("/api/stats", key=token)
        assert reply.told == (503, "unavailable", None)
        assert int(reply.headers["Retry-After"]) > 0
        assert (await backend.get("/api/stats", key="unknown")).told == reply.told
        assert (await backend.get("/api/tokens")).told == reply.told
        assert (await backend.post("/api/tokens", {"user_id": 1})).told == reply.told
        assert (await backend.delete("/api/tokens/1")).told == reply.told
        assert (await backend.post("/api/messages", CHAT)).body["delivery"]["matched"] == 1
        assert (await received(device))["message"] == CHAT["message"]
        async with asyncio.timeout(10):  # nobody is said not to exist once the file is known lost
            while (await backend.post("/api/messages", {**CHAT, "user_id": 77})).status != 200:
                pass
        assert (await backend.get("/api/connections")).data["connections"]
        async with backend.session.get("/readyz") as readiness:
            assert readiness.status == 503
            assert (await readiness.json())["reasons"]
        async with backend.session.get("/healthz") as health:
            assert health.status == 200
        away.rename(backend.accounts.path)
        async with asyncio.timeout(10):
            while await ready(token) != 200:
                pass


@contextlib.contextmanager
def other_writer(accounts: Accounts) -> Iterator[sqlite3.Connection]:
    """Another program that is writing to the database until it is told to ROLLBACK."""
    with contextlib.closing(sqlite3.connect(accounts.path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


async def test_a_locked_database_delays_a_new_token_and_does_not_lose_it(backend: Backend) -> None:
    with other_writer(backend.accounts) as lock:
        creating = asyncio.create_task(backend.post("/api/tokens", {"user_id": 1}))
        assert (await backend.get("/api/stats")).status == 200
        lock.execute("ROLLBACK")
    assert (await creating).data["token"].startswith("wsg_")


# Who is here.


def fits(document: Any, kind: Any) -> None:
    """Fail unless a document has the declared fields and no others."""
    shape = msgspec.convert(document, kind)
    assert msgspec.to_builtins(shape).keys() >= document.keys()


async def test_a_connection_is_described_by_everyone_who_can_be_asked(backend: Backend) -> None:
    began = datetime.now(UTC)
    async with backend.instance.device() as device:
        await ask(device, {"type": "ping"})
        page = (await backend.get("/api/connections")).data
        assert page.keys() == {"connections", "next", "complete"}
        [row] = page["connections"]
        address = device.local_address
        assert {**row, "connected_at": "", "last_activity": ""} == {
            "id": row["id"],
            "user_id": 1,
            "device_id": 1,
            "instance": "here",
            "address": row["address"],
            "messages": 1,
            "connected_at": "",
            "last_activity": "",
        }
        assert str(address[0]) in row["address"]
        since, active = (
            datetime.fromisoformat(row[name]) for name in ("connected_at", "last_activity")
        )
        assert began.timestamp() - 1 <= since.timestamp() <= active.timestamp() + 0.001
        assert active.timestamp() <= time.time() + 1
        fits(page, answers.Connections)
        for kind in ("user", "device"):
            person = (await backend.get(f"/api/{kind}s/1")).data
            assert person.keys() == {
                f"{kind}_id", "online", "connections", "last_activity", "complete",
            }  # fmt: skip
            assert (person[f"{kind}_id"], person["online"], person["complete"]) == (1, True, True)
            assert [one["id"] for one in person["connections"]] == [row["id"]]
            fits(person, answers.Person)
        users = (await backend.get("/api/users/online")).data
        assert users.keys() == {"users", "next", "complete"}
        [user] = users["users"]
        assert (user["user_id"], user["connections"], user["instances"]) == (1, 1, ["here"])
        fits(users, answers.OnlineUsers)
        before = (await backend.get("/api/users/1")).data["last_activity"]
        await ask(device, {"type": "ping"})
        assert (await backend.get("/api/users/1")).data["last_activity"] > before
    gone = await backend.until(lambda reply: not reply.data["online"], "GET", "/api/users/1")
    assert gone.data == {
        "user_id": 1, "online": False, "connections": [], "last_activity": None, "complete": True,
    }  # fmt: skip
    assert (await backend.get("/api/users/online")).data["users"] == []


async def pages(backend: Backend, path: str, part: str, limit: int) -> list[list[dict[str, Any]]]:
    """All pages of a list."""
    found: list[list[dict[str, Any]]] = []
    cursor = ""
    while True:
        page = (await backend.get(f"{path}?limit={limit}{cursor}")).data
        found.append(page[part])
        if page["next"] is None:
            return found
        assert re.fullmatch(r"[\w-]+", page["next"])
        cursor = f"&cursor={page['next']}"


async def test_lists_are_read_page_by_page_without_a_gap_or_a_repetition(backend: Backend) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(6):
            user, _ = await backend.accounts.add_user(f"user-{number}", f"device-{number}")
            token = await backend.accounts.add_token(user)
            for _ in range(1 + number % 2):
                await stack.enter_async_context(backend.instance.device(token))
        for limit in (1, 2, 4, 1000):
            users = await pages(backend, "/api/users/online", "users", limit)
            assert [row["user_id"] for page in users for row in page] == list(range(2, 8))
            assert [row["connections"] for page in users for row in page] == [1, 2] * 3
            rows = await pages(backend, "/api/connections", "connections", limit)
            ids = [row["id"] for page in rows for row in page]
            assert ids == sorted(set(ids))
            assert len(ids) == 9
            tokens = await pages(backend, "/api/tokens", "tokens", limit)
            assert [row["id"] for page in tokens for row in page] == list(range(1, 8))
            for found in (users, rows, tokens):
                assert all(len(page) == limit for page in found[:-1])
                assert len(found[-1]) < limit
        about = "/api/connections?limit=1&user_id=3"
        first = (await backend.get(about)).data
        second = (await backend.get(f"{about}&cursor={first['next']}")).data
        both = first["connections"] + second["connections"]
        assert [row["user_id"] for row in both] == [3, 3]
        assert len({row["id"] for row in both}) == 2
        for query, count in (
            ("device_id=3", 2),
            ("user_id=3&device_id=3", 2),
            ("user_id=2&device_id=3", 0),
            ("user_id=99", 0),
        ):
            found_rows = (await backend.get(f"/api/connections?{query}")).data["connections"]
            assert len(found_rows) == count, query
        assert len((await backend.get("/api/tokens?user_id=3")).data["tokens"]) == 1


def sealed(*parts: object) -> str:
    """A cursor that nobody was given."""
    return base64.urlsafe_b64encode(orjson.dumps(parts)).decode().rstrip("=")


LISTS = ("users/online", "connections", "tokens")


async def test_a_cursor_from_elsewhere_is_refused(backend: Backend) -> None:
    own = {
        "users/online": make_cursor("users", [1]),
        "connections": make_cursor("connections", ["here", "x"]),
        "tokens": make_cursor("tokens", [1]),
    }
    for path in LISTS:
        kind = path.split("/")[0]
        bad = {
            *(cursor for other, cursor in own.items() if other != path),
            *(own[path][:-2], own[path][3:], own[path].swapcase(), "x", "....", "你好", "e30", "W10"),
            *("AAAA" * 50, "A" * 201, base64.urlsafe_b64encode(b"[" * 100).decode()),
            sealed(kind), sealed(kind, None), sealed(kind, True), sealed(kind, 1.5),
            sealed(kind, [1]), sealed(kind, 1, 1), sealed(kind, "x", 1), sealed(kind, {"a": 1}),
            sealed(kind, 2**64 - 1), sealed(kind, 2**63), sealed([kind], 1), sealed(5, 1),
        }  # fmt: skip
        for cursor in bad:
            reply = await backend.get(f"/api/{path}?cursor={cursor}")
            assert reply.told == (422, "invalid", "cursor"), (path, cursor)
        assert (await backend.get(f"/api/{path}?cursor={own[path]}")).status == 200


@given(st.lists(st.one_of(st.text(max_size=20), st.integers(0, 2**63 - 1)), max_size=3))
def test_a_cursor_is_read_as_it_was_made(place: list[Any]) -> None:
    cursor = make_cursor("list", place)
    assert read_cursor(cursor, "list", place) == place
    assert read_cursor(None, "list", place) == place
    with pytest.raises(Problem):
        read_cursor(cursor, "another", place)
    with pytest.raises(Problem):
        read_cursor(cursor, "list", [*place, 1])


@given(st.one_of(st.text(max_size=200), st.binary(max_size=150).map(base64.urlsafe_b64encode)))
def test_whatever_is_no_cursor_is_one_known_failure(text: str | bytes) -> None:
    text = text.decode() if isinstance(text, bytes) else text
    with pytest.raises(Problem) as failed:
        read_cursor(text, "list", [1])
    assert failed.value.document()["field"] == "cursor"


async def test_stats_tell_of_this_instance_and_of_what_calls_took(backend: Backend) -> None:
    bob, _ = await backend.accounts.add_user("bob")
    bobs = await backend.accounts.add_token(bob)
    device = backend.instance.device
    async with device(), device(), device(bobs):
        for _ in range(3):
            await backend.post("/api/messages", CHAT)
        stats = (await backend.get("/api/stats")).data
        counts = {"connections": 3, "users": 2, "devices": 1}
        assert stats == {
            "instance": "here",
            "version": __version__,
            **counts,
            "rates": stats["rates"],
            "operations": stats["operations"],
            "redis": {},
            "instances": {"here": counts},
        }
        assert stats["rates"].keys() == {"messages_in", "messages_out", "connects"}
        took = stats["operations"]["api POST /api/messages"]
        assert took.keys() == {"count", "mean_ms", "max_ms", "slow"}
        assert (took["count"], took["slow"]) == (3, 0)
        assert 0 < took["mean_ms"] <= took["max_ms"]
        fits(stats, answers.Stats)


# Cutting.


@pytest.mark.parametrize("by", ["connection", "user", "device"])
async def test_whom_an_operator_cuts_is_closed_with_4003_and_counted(
    backend: Backend, by: str
) -> None:
    bob, _ = await backend.accounts.add_user("bob", "lamp")
    bobs = await backend.accounts.add_token(bob)
    device = backend.instance.device
    async with device() as one, device() as two, device(bobs) as other:
        if by == "connection":
            # Of two alike, the one that sent something is told apart.
            await ask(one, {"type": "ping"})
            rows = (await backend.get("/api/connections?user_id=1")).data["connections"]
            [row] = [row for row in rows if row["messages"]]
            reply = await backend.delete(f"/api/connections/{row['id']}")
            again = await backend.delete(f"/api/connections/{row['id']}")
            assert again.told[:2] in ((404, "not_found"), (200, ""))  # its close may be under way
            cut, left = [one], [two, other]
        else:
            reply = await backend.post(f"/api/{by}s/1/disconnect", {"reason": "maintenance"})
            cut, left = [one, two], [other]
        count = len(cut)
        assert reply.data == {"cut": count, "instances": {"here": count}, "complete": True}
        for each in cut:
            reason = "disconnected" if by == "connection" else "maintenance"
            assert await close_of(each) == (4003, reason)
        for each in left:
            assert await got_nothing(each)
        await backend.until(
            lambda reply: reply.data["connections"] == len(left), "GET", "/api/stats"
        )
    async with device():  # it may come back
        pass


@pytest.mark.parametrize("by", ["users", "devices"])
async def test_to_cut_whoever_is_not_here_is_a_success_that_cuts_nobody(
    backend: Backend, by: str
) -> None:
    async with backend.instance.device() as device:
        bob, _ = await backend.accounts.add_user("bob", "lamp")
        reply = await backend.post(f"/api/{by}/{bob}/disconnect")
        assert reply.data == {"cut": 0, "instances": {"here": 0}, "complete": True}
        assert await got_nothing(device)


async def test_a_reason_longer_than_a_close_frame_is_cut_between_characters(
    backend: Backend,
) -> None:
    async with backend.instance.device() as device:
        reply = await backend.post("/api/users/1/disconnect", {"reason": "修" * 100})
        assert reply.data["cut"] == 1
        code, reason = await close_of(device)
        assert code == 4003
        assert 0 < len(reason.encode()) <= 123
        assert set(reason) == {"修"}


async def test_a_disabled_user_is_cut_and_kept_out_until_he_is_enabled(accounts: Accounts) -> None:
    async with calling(accounts, auth__poll_interval=5) as backend:
        async with backend.instance.device() as device:
            reply = await backend.post("/api/users/1/disable")
            assert reply.data == {
                "active": False, "cut": 1, "instances": {"here": 1}, "complete": True,
            }  # fmt: skip
            assert (await close_of(device))[0] == 4001
        with pytest.raises(InvalidStatus) as refused:
            async with backend.instance.device():
                pass
        assert refused.value.response.status_code == 403
        reply = await backend.post("/api/users/1/enable")
        assert reply.data == {"active": True, "cut": 0, "instances": {"here": 0}, "complete": True}
        async with backend.instance.device() as device:
            assert await got_nothing(device)


# The queue.


async def test_without_redis_there_is_no_queue_and_everything_else_works(backend: Backend) -> None:
    for reply in (
        await backend.get("/api/queue"),
        await backend.post("/api/queue", {"user_id": 1, "message": {}}),
        await backend.delete("/api/queue"),
    ):
        assert reply.told == (503, "unavailable", None)
        assert "redis" in reply.body["message"]


# The end.


async def test_a_gateway_that_stops_finishes_the_request_under_way(accounts: Accounts) -> None:
    async with calling(accounts) as backend, socket_to(backend.instance) as (reader, writer):
        with other_writer(accounts) as lock:
            writer.write(request(b'{"user_id": 1}', start="POST /api/tokens"))
            assert (await backend.get("/api/stats")).status == 200  # that one was read before
            backend.instance.stop.set()
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    while True:
                        async with socket_to(backend.instance):
                            pass
            lock.execute("ROLLBACK")
        assert (await read_reply(reader)).data["token"].startswith("wsg_")
