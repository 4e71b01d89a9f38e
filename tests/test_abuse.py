"""Peers that break the rules: each gets a clear answer or is cut, and harms nobody else.

Every test has a bystander, a device that is answered in the end, and leaves no trace of its peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.frames import Opcode

from tests.conftest import Accounts, Instance, eventually, running_gateway
from tests.test_device_socket import PING, UNAUTHORIZED, Heard, Peer, frame, peer, request, untimed
from wsgateway.connection import Connection
from wsgateway.handlers import handler

pytestmark = pytest.mark.faults

MIB = 1 << 20
TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
NO_LIMIT = 2**31 - 1
GOOD = request("/ws/device/?token=TOKEN")
PONG = {"type": "pong"}


class Bystander:
    """A device that behaves, and reads whatever comes."""

    def __init__(self, device: ClientConnection) -> None:
        self._device = device
        self._pongs = 0
        self.notes = 0

    async def read(self) -> None:
        async for text in self._device:
            kind = orjson.loads(text)["type"]
            self._pongs += kind == "pong"
            self.notes += kind == "note"

    async def is_answered(self) -> None:
        """Send a ping and wait for its answer."""
        expected = self._pongs + 1
        await self._device.send(orjson.dumps(PING).decode())
        await eventually(lambda: self._pongs == expected)


Abused = Callable[..., contextlib.AbstractAsyncContextManager[tuple[Instance, Bystander]]]


@pytest.fixture
def abused(accounts: Accounts, caplog: pytest.LogCaptureFixture) -> Abused:
    """A gateway and a bystander. On leaving all must be well and nothing may be left."""

    @contextlib.asynccontextmanager
    async def run(**overrides: Any) -> AsyncIterator[tuple[Instance, Bystander]]:
        token = await accounts.add_token()
        async with running_gateway(
            accounts, **{"keepalive__close_timeout": 0.3, **overrides}
        ) as gateway:
            async with gateway.device(token) as device:
                bystander = Bystander(device)
                reading = asyncio.create_task(bystander.read())
                yield gateway, bystander
                await bystander.is_answered()
            await reading
            await nothing_left(gateway, 0)
        complaints = [each for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(complaints) <= 1
        assert accounts.token not in caplog.text

    return run


async def nothing_left(gateway: Instance, connections: int = 1) -> None:
    """Wait until only so many connections are there, and nothing else is remembered."""
    listener = gateway.running.instance.listener
    await eventually(lambda: listener.connections == connections)
    for registry in ("_handshakes", "_closing", "_congested", "_tasks"):
        await eventually(lambda name=registry: not getattr(listener, name))
    assert sum(map(len, listener._wheel)) == connections
    assert len(gateway.running.instance.gateway.hub.members("all")) == connections
    assert len(gateway.running.instance.gateway.hub) == (3 if connections else 0)


class Watch:
    """The most bytes, read and to be written, that were held for one connection after any turn."""

    def __init__(self, gateway: Instance) -> None:
        self._connections: set[Connection] = gateway.running.instance.listener._connections
        self.read = self.unwritten = 0

    def look(self) -> None:
        for each in self._connections:
            if not each._transport.is_closing():
                held = sum(len(item) for item in each._held or () if isinstance(item, bytes))
                half = len(each._core.reader.buffer) if each._core else 0
                request = len(each._request._read) if each._request else 0
                self.read = max(self.read, held + request + len(each._early) + half)
                self.unwritten = max(self.unwritten, each._transport.get_write_buffer_size())

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def watching(gateway: Instance) -> AsyncIterator[Watch]:
    watch = Watch(gateway)
    task = asyncio.create_task(watch.run())
    yield watch
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


# Handshakes.


def without(name: bytes, instead: bytes = b"") -> bytes:
    """A good request but for one header."""
    lines = GOOD.split(b"\r\n")
    (at,) = [n for n, line in enumerate(lines) if line.startswith(name + b":")]
    lines[at : at + 1] = [instead] if instead else []
    return b"\r\n".join(lines)


KEY = b"Sec-WebSocket-Key"
VERSION = b"Sec-WebSocket-Version"
MALFORMED: list[tuple[str, bytes, int]] = [
    ("not HTTP", b"hello\r\n\r\n", 400),
    ("one word", b"GET\r\n\r\n", 400),
    ("empty lines", b"\r\n\r\n", 400),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("HTTP/1.0", GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
    ("HTTP/1.2", GOOD.replace(b"HTTP/1.1", b"HTTP/1.2"), 400),
    ("bare line feeds", GOOD.replace(b"\r\n", b"\n"), 400),
    ("path not ASCII", GOOD.replace(b"/ws/", b"/w\xff/"), 400),
    ("NUL in a header", without(b"Host", b"Host: gate\0way"), 400),
    ("control in a header", without(b"Host", b"Host: gate\x1bway"), 400),
    ("folded header", without(b"Host", b"Host: gate\r\n way"), 400),
    ("no colon", without(b"Host", b"Host gateway"), 400),
    ("space before colon", without(b"Host", b"Host : gateway"), 400),
    ("body", without(b"Host", b"Content-Length: 5") + b"hello", 400),
    ("negative body", without(b"Host", b"Content-Length: -1"), 400),
    ("chunked", without(b"Host", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("long path", GOOD.replace(b"?", b"?" + b"x" * 9000 + b"&"), 414),
    ("endless path", b"GET /" + b"x" * 100_000, 431),
    ("long header", without(b"Host", b"Host: " + b"x" * 9000), 431),
    ("many headers", without(b"Host", b"\r\n".join([b"X: y"] * 200)), 431),
    ("large request", without(b"Host", b"\r\n".join([b"X: " + b"y" * 4000] * 10)), 431),
    ("POST", GOOD.replace(b"GET", b"POST"), 405),
    ("no method of ours", GOOD.replace(b"GET", b"BREW"), 405),
    ("no upgrade", without(b"Upgrade"), 426),
    ("upgrade to h2c", without(b"Upgrade", b"Upgrade: h2c"), 426),
    ("two upgrades", without(b"Upgrade", b"Upgrade: websocket\r\nUpgrade: websocket"), 426),
    ("no connection", without(b"Connection"), 426),
    ("other connection", without(b"Connection", b"Connection: close"), 426),
    ("malformed connection", without(b"Connection", b"Connection: a b;c"), 400),
    ("no key", without(KEY), 400),
    ("two keys", without(KEY, b"\r\n".join([KEY + b": dGhlIHNhbXBsZSBub25jZQ=="] * 2)), 400),
    ("short key", without(KEY, KEY + b": dGhl"), 400),
    ("no base64", without(KEY, KEY + b": !!!!"), 400),
    ("key not ASCII", without(KEY, KEY + b": dGhlIHNhbXBsZSBub25jZQ=\xff"), 400),
    ("no version", without(VERSION), 400),
    ("old version", without(VERSION, VERSION + b": 8"), 400),
    ("two versions", without(VERSION, b"\r\n".join([VERSION + b": 13"] * 2)), 400),
    ("bad subprotocol", without(b"Host", b"Sec-WebSocket-Protocol: a b"), 400),
]


def rows(table: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The rows of a table whose first column names them."""
    return [pytest.param(*row[1:], id=row[0]) for row in table]


@pytest.mark.parametrize(("sent", "status"), rows(MALFORMED))
async def test_a_malformed_handshake_is_refused_and_counted_once(
    abused: Abused, sent: bytes, status: int
) -> None:
    async with abused() as (gateway, _):
        async with peer(gateway, sent.replace(b"TOKEN", gateway.token.encode())) as client:
            answer = await client.answer()
            assert answer.status == status
            assert answer.headers["connection"] == "close"
            assert gateway.token.encode() not in answer.body
        metrics = gateway.running.instance.metrics
        assert (sum(metrics.refused.values()), metrics.opened) == (1, 1)


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
"""How TLS begins."""


@pytest.mark.parametrize(
    "sent", [b"", b"GET /ws", GOOD[:60], GOOD[:-2], HELLO], ids=["0", "7", "60", "-2", "TLS"]
)
async def test_half_a_handshake_is_cut_at_its_deadline(abused: Abused, sent: bytes) -> None:
    async with abused(limits__handshake_timeout=0.3) as (gateway, _):
        async with peer(gateway, sent) as client:
            assert await client.hear_rest() == []
            await nothing_left(gateway)
        assert gateway.running.instance.metrics.refused == {"handshake_timeout": 1}


async def test_a_handshake_of_one_byte_at_a_time_does_not_move_its_deadline(
    abused: Abused,
) -> None:
    async with abused(limits__handshake_timeout=0.3) as (gateway, _), peer(gateway) as client:
        left = list(GOOD)
        with contextlib.suppress(ConnectionError):
            while left and not client.reader.at_eof():
                client.send(bytes([left.pop(0)]))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await client.reader.read(1)
        assert left
        assert gateway.running.instance.metrics.refused == {"handshake_timeout": 1}


async def test_a_handshake_that_never_ends_is_not_kept_in_memory(abused: Abused) -> None:
    async with abused() as (gateway, _), watching(gateway) as watch:
        async with peer(gateway, GOOD[:-2] + b"X: y\r\n" * 2) as client:
            with contextlib.suppress(ConnectionError):
                for _ in range(160):
                    client.send(b"X" * 65_536)
                    await client.writer.drain()
            await client.gone()
            await nothing_left(gateway)
        assert watch.read < 131_072
        assert sum(gateway.running.instance.metrics.refused.values()) == 1


@pytest.mark.parametrize("cut", [0, 1, 3, 20, 61], ids=str)
async def test_frames_in_the_segment_of_the_request_are_answered(abused: Abused, cut: int) -> None:
    frames = frame(PING) + frame(b"a", Opcode.PING) + frame(PING) + frame(PING)
    async with abused() as (gateway, _):
        good = request(f"/ws/device/?token={gateway.token}")
        async with peer(gateway, good + frames[:cut]) as device:
            assert (await device.answer()).status == 101
            assert (await device.hear()).message["type"] == "connection_status"
            device.send(frames[cut:])
            heard = [await device.hear() for _ in range(4)]
        kinds = [each.opcode for each in heard]
        assert sorted(kinds) == [TEXT, TEXT, TEXT, Opcode.PONG]


async def test_all_frames_may_come_in_the_segment_of_the_request(abused: Abused) -> None:
    async with abused() as (gateway, _):
        good = request(f"/ws/device/?token={gateway.token}")
        close = frame(b"\x03\xe8", Opcode.CLOSE)
        async with peer(gateway, good + frame(PING) * 50 + close) as device:
            assert (await device.answer()).status == 101
            status, *pongs, last = await device.hear_rest()
        assert status.message["type"] == "connection_status"
        assert [untimed(pong.message) for pong in pongs] == [PONG] * 50
        assert last == (Opcode.CLOSE, b"\x03\xe8")


@pytest.mark.parametrize(("token", "status"), [("TOKEN", 101), ("wrong", 403)])
async def test_a_client_that_half_closes_after_its_request_gets_its_answer(
    abused: Abused, token: str, status: int
) -> None:
    async with abused() as (gateway, _):
        sent = request(f"/ws/device/?token={token.replace('TOKEN', gateway.token)}")
        async with peer(gateway, sent + (frame(PING) if status == 101 else b"")) as client:
            client.writer.write_eof()
            assert (await client.answer()).status == status
            if status == 101:
                heard = await client.hear_rest()
                assert [each.message["type"] for each in heard] == ["connection_status", "pong"]
            await nothing_left(gateway)


async def test_what_follows_a_refused_request_is_nobodys(abused: Abused) -> None:
    async with abused() as (gateway, _), watching(gateway) as watch:
        refused = request("/ws/device/?token=wrong")
        async with peer(gateway, refused + frame(PING) * 50, b"x" * MIB) as client:
            answer = await client.answer()
            assert (answer.status, answer.body) == (403, UNAUTHORIZED)
            await nothing_left(gateway)
        assert watch.read < MIB // 2
        assert gateway.running.instance.metrics.received == {}


# Messages.


def nested(depth: int, left: str = "[", right: str = "]") -> str:
    """A ping with so many levels, the message's own included."""
    return f'{{"type":"ping","message":{left * (depth - 1)}{right * (depth - 1)}}}'


BOMBS: list[tuple[str, str, str]] = [
    ("32 levels", nested(32), "pong"),
    ("33 levels", nested(33), "INVALID_JSON"),
    ("33 objects", '{"type":"ping","a":' + '{"a":' * 32 + "1" + "}" * 33, "INVALID_JSON"),
    ("255 levels", nested(255), "INVALID_JSON"),
    ("1,025 levels", nested(1025), "INVALID_JSON"),
    ("5,000 levels", nested(5000), "INVALID_JSON"),
    ("10,000 open", "[" * 10_000, "INVALID_JSON"),
    ("2,000 objects open", '{"a":' * 2000, "INVALID_JSON"),
    ("wide", '{"type":"ping","message":[' + "[]," * 3000 + "1]}", "pong"),
    ("brackets in a text", '{"type":"ping","message":"' + "[" * 5000 + '"}', "pong"),
    ("NaN", '{"type":"ping","message":NaN}', "INVALID_JSON"),
    ("1e400", '{"type":"ping","message":1e400}', "INVALID_JSON"),
    ("Infinity", '{"type":"ping","message":[Infinity]}', "INVALID_JSON"),
    ("2^64", '{"type":"ping","message":18446744073709551616}', "pong"),
    ("2^64 for a text", '{"type":"chat_message","message":18446744073709551616}',
     "VALIDATION_ERROR"),
    ("2^64 for a time", '{"type":"ping","timestamp":18446744073709551616}', "VALIDATION_ERROR"),
    ("2^64 for a type", '{"type":18446744073709551616}', "VALIDATION_ERROR"),
    ("5,000 digits", '{"type":"ping","message":' + "9" * 5000 + "}", "INVALID_JSON"),
    ("lone surrogate", '{"type":"chat_message","message":"\\udc00"}', "INVALID_JSON"),
    ("surrogates swapped", '{"type":"ping","message":"\\ude00\\ud83d"}', "INVALID_JSON"),
    ("surrogate as a key", '{"type":"ping","\\ud800":1}', "INVALID_JSON"),
    ("surrogate pair", '{"type":"ping","message":"\\ud83d\\ude00"}', "pong"),
    ("duplicate keys, known last", '{"type":"nope","type":"ping"}', "pong"),
    ("duplicate keys, known first", '{"type":"ping","type":"nope"}', "UNSUPPORTED_TYPE"),
    ("NUL in the type", '{"type":"ping\\u0000"}', "UNSUPPORTED_TYPE"),
    ("1,000 keys", orjson.dumps(PING | {f"k{n}": n for n in range(900)}).decode(), "pong"),
    ("comments", '/**/{"type":"ping"}', "INVALID_JSON"),
    ("single quotes", "{'type':'ping'}", "INVALID_JSON"),
    ("trailing comma", '{"type":"ping",}', "INVALID_JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), rows(BOMBS))
async def test_a_message_that_tries_the_reader_is_answered_and_the_device_stays(
    abused: Abused, text: str, expected: str
) -> None:
    async with abused() as (gateway, _), peer(gateway, upgraded=True) as device:
        device.send(frame(text.encode()), frame(PING))
        answer = (await device.hear()).message
        assert answer.get("code", answer["type"]) == expected
        assert untimed((await device.hear()).message) == PONG


async def test_a_flood_of_messages_is_answered_up_to_the_limit(abused: Abused) -> None:
    async with abused() as (gateway, _), peer(gateway, upgraded=True) as device:
        device.send(frame(b"{}") * 5000)
        *errors, over, last = await device.hear_rest()
        assert len(errors) == 100
        assert over.message["code"] == "RATE_LIMITED"
        assert last.code == 4008
        await nothing_left(gateway)


# Frames.

NO_UTF8 = {
    "a byte that is none": b"\xff",
    "an overlong slash": b"\xc0\xaf",
    "an encoded surrogate": b"\xed\xa0\x80",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "cut off": b"\xe9\xb1",
    "only a tail": b"\xb1",
}


def split(data: bytes, opcode: Opcode = TEXT) -> bytes:
    """A message in frames of one byte each, and an empty one at the end."""
    frames = [frame(bytes([byte]), CONT if at else opcode, False) for at, byte in enumerate(data)]
    return b"".join([*frames, frame(b"", CONT)])


def first_byte(byte: int) -> bytes:
    """A frame whose first byte is changed."""
    return bytes([byte]) + frame(b"{}")[1:]


BROKEN: list[tuple[str, bytes, int]] = [
    ("unmasked", b"\x81\x02{}", 1002),
    ("unmasked ping", b"\x89\x00", 1002),
    ("unmasked close", b"\x88\x02\x03\xe8", 1002),
    *((f"RSV{n}", first_byte(0x81 | 0x80 >> n), 1002) for n in (1, 2, 3)),
    ("RSV1 on a ping", b"\xc9\x80abcd", 1002),
    *((f"opcode {n}", first_byte(0x80 | n), 1002) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    ("end of nothing", frame(b"x", CONT), 1002),
    ("middle of nothing", frame(b"x", CONT, False), 1002),
    ("text in a text", frame(b"x", TEXT, False) + frame(PING), 1002),
    ("binary in a text", frame(b"x", TEXT, False) + frame(b"", BINARY), 1002),
    ("text in a binary", frame(b"x", BINARY, False) + frame(PING, TEXT, False), 1002),
    ("a ping in fragments", frame(b"", Opcode.PING, False), 1002),
    ("a close in fragments", frame(b"", Opcode.CLOSE, False), 1002),
    ("a long ping", frame(b"x" * 126, Opcode.PING), 1002),
    ("a long close", frame(b"\x03\xe8" + b"x" * 124, Opcode.CLOSE), 1002),
    ("close of one byte", frame(b"\x03", Opcode.CLOSE), 1002),
    *(
        (f"close with {code}", frame(struct.pack("!H", code), Opcode.CLOSE), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535)
    ),
    ("close in no text", frame(b"\x03\xe8\xff", Opcode.CLOSE), 1007),
    *(
        (f"{length} bytes", b"\x81\xff" + length.to_bytes(8, "big"), 1009)
        for length in (65_537, 2**31, 2**63 - 1, 2**64 - 1)
    ),
    ("binary too long", frame(b"x" * 65_537, BINARY), 1009),
    ("fragments too long", frame(b"x" * 40_000, TEXT, False) + frame(b"x" * 40_000, CONT), 1009),
    ("too many fragments", split(b"12345678"), 1009),
    (
        "too many empty ones",
        frame(b"", TEXT, False) + frame(b"", CONT, False) * 8 + frame(b"", CONT),
        1009,
    ),
    ("too many of a binary", split(b"12345678", BINARY), 1009),
    *((name, frame(data), 1007) for name, data in NO_UTF8.items()),
    *((f"{name}, split", split(data), 1007) for name, data in NO_UTF8.items()),
    *(
        (f"{name}, in a message", frame(b'{"type":"ping","message":"' + data + b'"}'), 1007)
        for name, data in NO_UTF8.items()
    ),
    ("no text, too large", frame(b"x" * 20_000 + b"\xff"), 1007),
]


@pytest.mark.parametrize(("sent", "code"), rows(BROKEN))
async def test_a_broken_frame_ends_the_connection_after_the_answers_before_it(
    abused: Abused, sent: bytes, code: int
) -> None:
    async with abused(limits__fragments=8) as (gateway, _):
        async with peer(gateway, upgraded=True) as device:
            device.send(frame(PING), sent, frame(PING))
            pong, last = await device.hear_rest()
            assert untimed(pong.message) == PONG
            assert last.code == code
        await nothing_left(gateway)
        assert gateway.running.instance.metrics.closed[str(code)] == 1


def masked(first: int, length: bytes, data: bytes) -> bytes:
    """A frame with a length field of one's own."""
    return bytes([first]) + length + bytes(4) + data


def kinds_of(heard: list[Heard]) -> list[str]:
    """Opcodes of control frames, and types or error codes of messages."""
    return [
        each.message.get("code", each.message["type"]) if each.opcode == TEXT else
        Opcode(each.opcode).name.lower()
        for each in heard
    ]  # fmt: skip


HALVES = [frame(b'{"type":', TEXT, False), frame(b'"ping"}', CONT)]
UNUSUAL: list[tuple[str, bytes, list[str]]] = [
    ("a length longer than need be", masked(0x81, b"\xfe\x00\x0f", b'{"type":"ping"}'), ["pong"]),
    ("one much longer", masked(0x81, b"\xff" + bytes(7) + b"\x0f", b'{"type":"ping"}'), ["pong"]),
    ("fragments", b"".join(HALVES), ["pong"]),
    ("as many as may be", split(b"1234567"), ["VALIDATION_ERROR"]),
    ("a character split", split("鱼鱼".encode()), ["INVALID_JSON"]),
    ("empty ones", frame(b"", TEXT, False) + frame(b"", CONT), ["INVALID_JSON"]),
    ("a binary in fragments", split(b"\xff\xff", BINARY), ["UNSUPPORTED_DATA"]),
    ("fragments as long as may be",
     frame(b"x" * 32_768, TEXT, False) + frame(b"x" * 32_768, CONT), ["MESSAGE_TOO_LARGE"]),
    ("a ping between", HALVES[0] + frame(b"?", Opcode.PING) + HALVES[1], ["pong", "pong"]),
    ("a pong between", HALVES[0] + frame(b"", Opcode.PONG) + HALVES[1], ["pong"]),
    ("a close between", HALVES[0] + frame(b"", Opcode.CLOSE) + HALVES[1], ["close"]),
    ("a pong to no ping", frame(b"?", Opcode.PONG) + frame(PING), ["pong"]),
    ("a full ping", frame(b"x" * 125, Opcode.PING), ["pong"]),
    ("nothing after a close", frame(b"\x03\xe8", Opcode.CLOSE) + frame(PING), ["close"]),
    ("not even another close", frame(b"", Opcode.CLOSE) * 2, ["close"]),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "expected"), rows(UNUSUAL))
async def test_an_unusual_frame_is_as_good_as_any(
    abused: Abused, sent: bytes, expected: list[str]
) -> None:
    async with abused(limits__fragments=8) as (gateway, _), peer(gateway, upgraded=True) as device:
        device.send(sent)
        heard = [await device.hear() for _ in expected]
        assert kinds_of(heard) == expected
        if expected[-1] == "close":
            assert await device.hear_rest() == []
        else:
            device.send(frame(PING))
            assert untimed((await device.hear()).message) == PONG


async def test_a_ping_between_fragments_is_answered_before_their_message(abused: Abused) -> None:
    async with abused() as (gateway, _), peer(gateway, upgraded=True) as device:
        device.send(HALVES[0], frame(b"?", Opcode.PING))
        assert await device.hear() == (Opcode.PONG, b"?")
        device.send(HALVES[1])
        assert untimed((await device.hear()).message) == PONG


# Floods and stalls.


@pytest.mark.parametrize("kind", [Opcode.PING, Opcode.PONG])
@pytest.mark.parametrize("inside", [b"", frame(b"{", TEXT, False)], ids=["alone", "in fragments"])
async def test_a_flood_of_control_frames_ends_in_4008(
    abused: Abused, kind: Opcode, inside: bytes
) -> None:
    async with (
        abused(limits__control_frames=20) as (gateway, _),
        peer(gateway, upgraded=True) as device,
    ):
        device.send(inside, frame(b"?", kind) * 1000)
        *pongs, last = await device.hear_rest()
        assert set(pongs) <= {(Opcode.PONG, b"?")}
        assert last.code == 4008
        await nothing_left(gateway)


@pytest.mark.parametrize(
    "limits",
    [{}, {"limits__control_frames": NO_LIMIT}],
    ids=["limit of frames", "limit of bytes"],
)
async def test_forty_mebibytes_of_pings_from_a_peer_that_never_reads_are_not_kept(
    abused: Abused, limits: dict[str, int]
) -> None:
    pings = frame(b"x" * 125, Opcode.PING) * 8000  # 1 MiB
    async with abused(**limits) as (gateway, bystander), watching(gateway) as watch:
        async with peer(gateway, upgraded=True, receive_buffer=4096) as device:
            device.transport.pause_reading()
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    device.send(pings)
                    async with asyncio.timeout(20):
                        await device.writer.drain()
            await nothing_left(gateway)
        assert watch.unwritten <= MIB
        assert watch.read < MIB // 2
        aborted = gateway.running.instance.metrics.aborted
        assert sum(aborted.values()) == 1
        assert not limits or aborted["slow"] == 1
        await bystander.is_answered()


@contextlib.asynccontextmanager
async def stalled(gateway: Instance, accounts: Accounts) -> AsyncIterator[tuple[int, Peer]]:
    """A user and his only device, which has stopped reading."""
    user, _ = await accounts.add_user("bob")
    token = await accounts.add_token(user)
    async with peer(gateway, upgraded=True, token=token, receive_buffer=4096) as device:
        device.transport.pause_reading()
        yield user, device


NOTE = {"type": "note", "message": "x" * 30_000}


async def test_a_stalled_reader_is_cut_when_too_much_waits_and_others_get_everything(
    abused: Abused, accounts: Accounts
) -> None:
    async with (
        abused(limits__outbound_bytes=262_144, limits__outbound_stall=60) as (gateway, bystander),
        stalled(gateway, accounts),
        watching(gateway) as watch,
    ):
        aborted = gateway.running.instance.metrics.aborted
        while not aborted and bystander.notes < 1000:
            before = bystander.notes
            await gateway.running.instance.gateway.to_all(NOTE)
            await eventually(lambda before=before: bystander.notes == before + 1)
        assert aborted == {"slow": 1}
        assert watch.unwritten <= 262_144
        await nothing_left(gateway)


async def test_a_stalled_reader_is_cut_within_a_second_also_if_nothing_more_is_sent(
    abused: Abused, accounts: Accounts
) -> None:
    async with (
        abused(limits__outbound_bytes=262_144, limits__outbound_stall=60) as (gateway, _),
        stalled(gateway, accounts) as (user, _),
    ):
        for _ in range(400):  # 12 MB, of which the system takes no more than 4
            gateway.running.instance.gateway.to_user(user, NOTE)
        aborted = gateway.running.instance.metrics.aborted
        await eventually(lambda: aborted == {"slow": 1}, seconds=3)
        await nothing_left(gateway)


async def test_a_reader_that_takes_nothing_is_cut_though_little_waits(
    abused: Abused, accounts: Accounts
) -> None:
    async with (
        abused(limits__outbound_stall=0.5) as (gateway, _),
        stalled(gateway, accounts) as (user, _),
    ):
        listener = gateway.running.instance.listener
        while not listener._congested:
            await gateway.running.instance.gateway.to_user(user, NOTE)
            await asyncio.sleep(0)
        await nothing_left(gateway)
        assert gateway.running.instance.metrics.aborted == {"stalled": 1}


async def test_a_reader_that_is_stalled_does_not_hold_up_a_drain(accounts: Accounts) -> None:
    async with running_gateway(accounts, drain__window=0.5) as gateway:
        async with stalled(gateway, accounts) as (user, _), peer(gateway, upgraded=True):
            while not gateway.running.instance.listener._congested:
                await gateway.running.instance.gateway.to_user(user, NOTE)
                await asyncio.sleep(0)
            async with asyncio.timeout(0.5 + 2):
                await gateway.shut_down()
        await nothing_left(gateway, 0)
        assert gateway.running.instance.metrics.aborted["drain"] == 2


# Peers that do not say goodbye.


async def over_rate(gateway: Instance, device: Peer, accounts: Accounts) -> int:
    device.send(frame(PING) * 101)
    return 4008


async def revoked(gateway: Instance, device: Peer, accounts: Accounts) -> int:
    accounts.execute("UPDATE tokens SET revoked_at = 1 WHERE id = 1")
    return 4001


async def broken(gateway: Instance, device: Peer, accounts: Accounts) -> int:
    device.send(b"\x81\x00")
    return 1002


async def silent(gateway: Instance, device: Peer, accounts: Accounts) -> int:
    return 1011


@pytest.mark.parametrize("cause", [over_rate, revoked, broken, silent])
async def test_a_peer_that_does_not_answer_a_close_frame_is_cut(
    abused: Abused, accounts: Accounts, cause: Callable[..., Any]
) -> None:
    async with abused(keepalive__interval=0.3, keepalive__timeout=0.3) as (gateway, _):
        async with peer(gateway, upgraded=True) as device:
            code = await cause(gateway, device, accounts)
            assert (await device.hear_rest())[-1].code == code
            await nothing_left(gateway)
        assert gateway.running.instance.metrics.aborted == {"close_timeout": 1}


async def test_a_peer_that_goes_on_after_our_close_frame_is_not_listened_to(
    abused: Abused,
) -> None:
    async with (
        abused() as (gateway, _),
        watching(gateway) as watch,
        peer(gateway, upgraded=True) as device,
    ):
        device.send(frame(PING) * 101)
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                device.send(frame(b"x" * 60_000) * 16)
                await device.writer.drain()
        await nothing_left(gateway)
        assert sum(gateway.running.instance.metrics.aborted.values()) == 1
        assert gateway.running.instance.metrics.received_bytes < MIB
        assert watch.read < MIB // 2


async def test_a_peer_whose_close_frame_crosses_ours_hears_no_second_one(
    abused: Abused, accounts: Accounts
) -> None:
    async with abused() as (gateway, _):
        async with peer(gateway, upgraded=True) as device:
            accounts.execute("UPDATE tokens SET revoked_at = 1 WHERE id = 1")
            heard = await device.hear()
            assert heard.code == 4001
            device.send(frame(b"\x03\xe8", Opcode.CLOSE))
            assert await device.hear_rest() == []
        await nothing_left(gateway)
        assert gateway.running.instance.metrics.aborted == {}
        assert gateway.running.instance.metrics.closed == {"4001": 1}


LEAVING: list[tuple[str, bool, bytes]] = [
    ("before a word", False, b""),
    ("in its request", False, GOOD[:60]),
    ("after its request", False, GOOD),
    ("after its refused request", False, request("/ws/device/?token=wrong")),
    ("as a device", True, b""),
    ("in a frame", True, frame(PING)[:5]),
    ("in a message", True, frame(b"{", TEXT, False)),
    ("after a message", True, frame(PING)),
    ("after a chat message", True, frame({"type": "chat_message", "message": "hi"})),
    ("after its close frame", True, frame(b"\x03\xe8", Opcode.CLOSE)),
    ("after a broken frame", True, b"\x81\x00"),
]


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
@pytest.mark.parametrize(("upgraded", "sent"), rows(LEAVING))
async def test_a_peer_that_leaves_without_a_word_is_forgotten(
    abused: Abused, upgraded: bool, sent: bytes, reset: bool
) -> None:
    async with abused() as (gateway, _):
        sent = sent.replace(b"TOKEN", gateway.token.encode())
        async with peer(gateway, sent, upgraded=upgraded) as client:
            await eventually(lambda: gateway.running.instance.listener.connections != 1)
            if reset:
                end = client.transport.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.transport.abort()
            else:
                client.writer.write_eof()
                await client.gone()
            await nothing_left(gateway)


# Handlers that are slower than their devices.

GATES: list[asyncio.Event] = []
"""The last one holds up every chat message."""


@handler("chat_message")
async def hold(message: str) -> dict[str, Any]:
    await GATES[-1].wait()
    return {"message": message}


@pytest.fixture
def gate() -> Iterator[asyncio.Event]:
    GATES.append(asyncio.Event())
    yield GATES[-1]
    GATES.pop()


HELD: dict[str, Any] = {"handlers__modules": [__name__], "handlers__max_pending": 4}


def chats(first: int, last: int) -> bytes:
    messages = ({"type": "chat_message", "message": str(n)} for n in range(first, last))
    return b"".join(map(frame, messages))


async def test_reading_pauses_while_too_many_messages_wait_and_then_goes_on(
    abused: Abused, gate: asyncio.Event
) -> None:
    async with abused(**HELD) as (gateway, bystander), peer(gateway, upgraded=True) as device:
        metrics = gateway.running.instance.metrics
        device.send(chats(0, 30))
        await eventually(lambda: metrics.paused)
        device.send(chats(30, 60), frame(b"?", Opcode.PING), chats(60, 90))
        await bystander.is_answered()
        assert metrics.received["chat_message"] <= 4 + 1
        gate.set()
        heard = [await device.hear() for _ in range(91)]
        texts = [each.message["message"] for each in heard if each.opcode == TEXT]
        assert texts == [str(n) for n in range(90)]
        assert heard.count(Heard(Opcode.PONG, b"?")) == 1


async def test_what_comes_while_reading_is_paused_stays_with_its_sender(
    abused: Abused, gate: asyncio.Event
) -> None:
    async with (
        abused(**HELD, limits__messages=NO_LIMIT) as (gateway, bystander),
        watching(gateway) as watch,
        peer(gateway, upgraded=True) as device,
    ):
        metrics = gateway.running.instance.metrics
        device.send(chats(0, 10))
        await eventually(lambda: metrics.paused)
        received = metrics.received_bytes
        device.send(chats(10, 100) * 4000)  # 30 MB
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await device.writer.drain()
        await bystander.is_answered()
        assert metrics.received_bytes - received < MIB
        assert watch.read < MIB // 2
        gate.set()
        for number in range(50):
            message = (await device.hear()).message
            assert message["message"] == str(number)


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
async def test_a_peer_that_leaves_while_reading_is_paused_is_forgotten(
    abused: Abused, gate: asyncio.Event, reset: bool
) -> None:
    async with abused(**HELD, handlers__timeout=0.2) as (gateway, _):
        async with peer(gateway, upgraded=True) as device:
            device.send(chats(0, 10))
            await eventually(lambda: gateway.running.instance.metrics.paused)
            if reset:
                end = device.transport.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await nothing_left(gateway)


async def test_a_device_whose_reading_is_paused_is_still_cut_when_its_token_ends(
    abused: Abused, accounts: Accounts, gate: asyncio.Event
) -> None:
    async with abused(**HELD) as (gateway, _), peer(gateway, upgraded=True) as device:
        device.send(chats(0, 10))
        await eventually(lambda: gateway.running.instance.metrics.paused)
        accounts.execute("UPDATE tokens SET revoked_at = 1 WHERE id = 1")
        (last,) = await device.hear_rest()
        assert last.code == 4001
        await nothing_left(gateway)


async def converse(device: Peer, answers: int) -> None:
    """Hear so many answers, and answer pings meanwhile."""
    while answers:
        heard = await device.hear()
        assert heard.opcode != Opcode.CLOSE
        answers -= heard.opcode == TEXT
        device.send(frame(b"", Opcode.PONG))


async def test_a_device_whose_reading_is_paused_is_not_taken_for_dead(
    abused: Abused, gate: asyncio.Event
) -> None:
    async with (
        abused(**HELD, keepalive__interval=0.1, keepalive__timeout=0.1) as (gateway, _),
        peer(gateway, upgraded=True) as device,
    ):
        device.send(chats(0, 10))
        await eventually(lambda: gateway.running.instance.metrics.paused)
        conversing = asyncio.create_task(converse(device, 10))
        done, _ = await asyncio.wait({conversing}, timeout=0.6)
        assert not done
        gate.set()
        await conversing
