"""Compression: what is agreed on, that both ways work, and that no bomb is unpacked."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import zlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode

from tests.conftest import Accounts, Instance, ask, eventually, running_gateway
from wsgateway import wire
from wsgateway.config import Compression
from wsgateway.deflate import Deflate
from wsgateway.handshake import Reader, Visit
from wsgateway.metrics import Metrics

REQUEST = (
    "GET /ws/device/?token={} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{}\r\n"
)
OFFER = "Sec-WebSocket-Extensions: "
USUAL = OFFER + "permessage-deflate; client_max_window_bits\r\n"
LONG = "compress me " * 100
NO_TAKEOVER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


def deflate(**settings: Any) -> Deflate:
    return Deflate(Compression(enabled=True, **settings), Metrics())


def deflated(payload: bytes, bits: int = 15, mode: int = zlib.Z_SYNC_FLUSH) -> bytes:
    """A compressed message as a client sends it."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -bits)
    data = compressor.compress(payload) + compressor.flush(mode)
    return data[:-4] if mode == zlib.Z_SYNC_FLUSH else data


def masked(opcode: Opcode, data: bytes, *, fin: bool = True, rsv1: bool = False) -> bytes:
    sent = bytearray(Frame(opcode, data, fin).serialize(mask=True))
    sent[0] |= 0x40 * rsv1
    return bytes(sent)


# What is agreed on.


@pytest.mark.parametrize(
    ("offer", "window", "answer"),
    [
        ("", 15, None),
        ("permessage-deflate", 15, NO_TAKEOVER),
        ("permessage-deflate", 12, NO_TAKEOVER + "; server_max_window_bits=12"),
        ("permessage-deflate; client_max_window_bits", 15, NO_TAKEOVER),
        (
            "permessage-deflate; client_max_window_bits",
            12,
            NO_TAKEOVER + "; server_max_window_bits=12",
        ),
        (
            "permessage-deflate; client_max_window_bits=8",
            15,
            NO_TAKEOVER + "; client_max_window_bits=8",
        ),
        (
            "permessage-deflate; server_max_window_bits=15; client_max_window_bits=15",
            15,
            NO_TAKEOVER + "; server_max_window_bits=15; client_max_window_bits=15",
        ),
        (
            "permessage-deflate; server_max_window_bits=10",
            12,
            NO_TAKEOVER + "; server_max_window_bits=10",
        ),
        (
            'permessage-deflate; server_max_window_bits="9"',
            12,
            NO_TAKEOVER + "; server_max_window_bits=9",
        ),
        (
            "permessage-deflate; server_max_window_bits=14",
            12,
            NO_TAKEOVER + "; server_max_window_bits=12",
        ),
        ("permessage-deflate; server_no_context_takeover", 15, NO_TAKEOVER),
        # zlib cannot write with a window of 8 bits: declined, and the next offer taken.
        ("permessage-deflate; server_max_window_bits=8", 15, None),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", 15, NO_TAKEOVER),
        ("permessage-deflate, permessage-deflate", 15, NO_TAKEOVER),
        ("permessage-deflate; server_max_window_bits", 15, None),
        ("permessage-deflate; server_max_window_bits=16", 15, None),
        ("permessage-deflate; server_max_window_bits=09", 15, None),
        ("permessage-deflate; client_max_window_bits=7", 15, None),
        ("permessage-deflate; server_no_context_takeover=1", 15, None),
        ("permessage-deflate; client_max_window_bits; client_max_window_bits", 15, None),
        ("permessage-deflate; level=9", 15, None),
        ("x-webkit-deflate-frame", 15, None),
        ("x-unknown; a=b, permessage-deflate", 15, NO_TAKEOVER),
        ("permessage-deflate;", 15, "400"),
        ("permessage-deflate client_max_window_bits", 15, "400"),
        ("permessage-deflate; =1", 15, "400"),
        ('permessage-deflate; server_max_window_bits="10', 15, "400"),
        (",", 15, "400"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fast", [True, False])
def test_both_ways_of_reading_a_request_agree_on_the_same(
    offer: str, window: int, answer: str | None, fast: bool
) -> None:
    sent = REQUEST.format("K", f"{OFFER}{offer}\r\n" if offer else "").encode()
    visit = Reader(16_384, deflate(window_bits=window), fast=fast).feed(sent)
    assert isinstance(visit, Visit)
    lines = visit.answer.decode().split("\r\n")
    found = next((line.removeprefix(OFFER) for line in lines if line.startswith(OFFER)), None)
    if answer == "400":
        assert (visit.valid, visit.window_bits, lines[0]) == (False, 0, "HTTP/1.1 400 Bad Request")
        return
    assert (visit.valid, found) == (True, answer)
    _, asked, bits = (answer or "").partition("server_max_window_bits=")
    assert visit.window_bits == (int(bits.split(";")[0]) if asked else 15 if answer else 0)
    ignored = Reader(16_384, fast=fast).feed(sent)
    assert isinstance(ignored, Visit)
    assert (ignored.window_bits, OFFER.encode() in ignored.answer) == (0, False)


def test_without_compression_a_malformed_offer_is_ignored() -> None:
    visit = Reader(16_384).feed(REQUEST.format("K", OFFER + ";;\r\n").encode())
    assert isinstance(visit, Visit)
    assert (visit.valid, visit.window_bits) == (True, 0)


# How messages are written.


@pytest.mark.parametrize("bits", range(9, 16))
def test_a_frame_is_read_with_the_window_that_was_agreed_on(bits: int) -> None:
    payload = b"".join(f'{{"n":{n * n % 9973}}}'.encode() for n in range(5000))[:65_000]
    frame = deflate(level=9).framings[bits](payload)
    assert (frame[:2], int.from_bytes(frame[2:4], "big")) == (b"\xc1\x7e", len(frame) - 4)
    assert zlib.decompressobj(-bits).decompress(frame[4:] + b"\x00\x00\xff\xff") == payload


def test_what_is_short_or_does_not_shrink_goes_as_it_is() -> None:
    made = deflate(min_bytes=100)
    noise = bytes(n * n * n % 251 for n in range(100))
    for payload in (b"x" * 99, noise, b""):
        assert made.framings[12](payload) == wire.text_frame(payload)
    assert made.framings[12](b"x" * 100)[0] == 0xC1


def test_what_is_compressed_is_counted() -> None:
    metrics = Metrics()
    made = Deflate(Compression(enabled=True), metrics)
    frame = made.framings[12](b"x" * 1000)
    made.framings[12](b"short")
    assert metrics.compression_input_bytes == 1000
    assert metrics.compression_output_bytes == len(frame) - 2


# Devices.


def offering(**options: Any) -> dict[str, Any]:
    """What makes the library's client offer compression."""
    return {"compression": None, "extensions": [ClientPerMessageDeflateFactory(**options)]}


async def connected(gateway: Instance, **options: Any) -> ClientConnection:
    """A device that has received its connection_status; closed by whoever opened it."""
    device = await connect(gateway.url(), **options)
    assert orjson.loads(await device.recv())["type"] == "connection_status"
    return device


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "deflate"},
        offering(),
        offering(client_max_window_bits=9, server_max_window_bits=9),
        offering(client_max_window_bits=None),
    ],
)
async def test_messages_are_compressed_both_ways(
    accounts: Accounts, options: dict[str, Any]
) -> None:
    async with running_gateway(accounts, compression__enabled=True) as gateway:
        device = await connected(gateway, **options)
        metrics = gateway.running.instance.metrics
        before = metrics.received_bytes, metrics.sent_bytes
        for text in (LONG, "short", LONG[:500] + "\N{GRINNING FACE}"):
            answer = await ask(device, {"type": "chat_message", "message": text})
            assert answer["message"] == f"收到消息:{text}"
        received, sent = metrics.received_bytes - before[0], metrics.sent_bytes - before[1]
        assert received < 600
        assert sent < 700
        assert metrics.compression_agreed == 1
        assert metrics.compression_input_bytes > 1700
        await device.close()


async def test_by_default_nothing_is_compressed(gateway: Instance) -> None:
    device = await connected(gateway, compression="deflate")
    answer = await ask(device, {"type": "chat_message", "message": LONG})
    assert answer["message"] == f"收到消息:{LONG}"
    metrics = gateway.running.instance.metrics
    assert (metrics.compression_agreed, metrics.compression_input_bytes) == (0, 0)
    assert metrics.sent_bytes > len(LONG)
    await device.close()


async def test_a_mixed_group_gets_the_same_messages_in_order(accounts: Accounts) -> None:
    """Each is compressed once for each of the two windows, whatever the number of members."""
    async with running_gateway(
        accounts, compression__enabled=True, compression__window_bits=15
    ) as gateway:
        offers = [offering(), offering(server_max_window_bits=10), {"compression": None}]
        devices = [await connected(gateway, **offers[n % 3]) for n in range(9)]
        core = gateway.running.instance
        for n in range(20):
            core.gateway.to_user(1, {"type": "news", "n": n, "text": LONG})
            if n % 5 == 4:
                core.gateway.to_user(1, {"type": "short", "n": n})
                await asyncio.sleep(0)
        heard = [[await device.recv() for _ in range(24)] for device in devices]
        assert [orjson.loads(each)["n"] for each in heard[0] if b"news" in each.encode()] == [
            *range(20)
        ]
        assert all(each == heard[0] for each in heard)
        size = len(orjson.dumps({"type": "news", "n": 10, "text": LONG}))
        assert 2 * 20 * (size - 1) <= core.metrics.compression_input_bytes <= 2 * 20 * size
        await asyncio.gather(*(device.close() for device in devices))


# Frames that no library would send.


class Raw:
    """A device on a bare socket that agreed on compression, if not told otherwise."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.write = writer.write

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: its first byte and its payload, inflated if compressed."""
        async with asyncio.timeout(10):
            first, length = await self.reader.readexactly(2)
            if length == 126:
                length = int.from_bytes(await self.reader.readexactly(2), "big")
            data = await self.reader.readexactly(length)
        if first & 0x40:
            data = zlib.decompressobj(-15).decompress(data + b"\x00\x00\xff\xff")
        return first, data

    async def close_code(self) -> int:
        """The code of the close frame, after whatever comes before it."""
        while True:
            first, data = await self.frame()
            if first == 0x88:
                return int.from_bytes(data[:2], "big")


@contextlib.asynccontextmanager
async def raw_device(gateway: Instance, offer: str = USUAL) -> AsyncIterator[Raw]:
    """A device that has received its connection_status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(REQUEST.format(gateway.token, offer).encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101")
        assert (OFFER.encode() in answer) == bool(offer)
        raw = Raw(reader, writer)
        assert (await raw.frame())[0] == 0x81
        yield raw
    finally:
        writer.transport.abort()


@pytest.fixture
async def deflating(accounts: Accounts) -> Any:
    async with running_gateway(accounts, compression__enabled=True) as gateway:
        yield gateway


PING = deflated(b'{"type":"ping"}')
BOMB = deflated(b"\x20" * 5_000_000)


def fragmented(data: bytes, count: int, between: bytes = b"") -> bytes:
    """A compressed message in so many fragments, with bytes after each but the last."""
    size = -(-len(data) // count)
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return between.join(
        masked(
            Opcode.CONT if n else Opcode.TEXT,
            part,
            fin=n == len(parts) - 1,
            rsv1=not n,
        )
        for n, part in enumerate(parts)
    )


ENDED = deflated(b'{"type":"ping"}', mode=zlib.Z_FINISH) + b"\0"
"""A final block and what the RFC shows behind it (section 7.2.3.4)."""

FORMS = {
    "one frame": masked(Opcode.TEXT, PING, rsv1=True),
    "not compressed": masked(Opcode.TEXT, b'{"type":"ping"}'),
    "fragments": fragmented(PING, 5),
    "fragments, not compressed": masked(Opcode.TEXT, b'{"type":', fin=False)
    + masked(Opcode.CONT, b'"ping"}'),
    "a ping between fragments": fragmented(PING, 4, masked(Opcode.PING, b"?")),
    "an empty fragment at the end": masked(Opcode.TEXT, PING, rsv1=True, fin=False)
    + masked(Opcode.CONT, b""),
    "an empty fragment at the start": masked(Opcode.TEXT, b"", rsv1=True, fin=False)
    + masked(Opcode.CONT, PING),
    "a final block": masked(Opcode.TEXT, ENDED, rsv1=True),
    "a final block in fragments": fragmented(ENDED, 4),
    "two blocks": masked(
        Opcode.TEXT,
        deflated(b'{"type"', mode=zlib.Z_FULL_FLUSH) + deflated(b':"ping"}'),
        rsv1=True,
    ),
    "a stored block": masked(Opcode.TEXT, b'\x00\x0f\x00\xf0\xff{"type":"ping"}\x00', rsv1=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1, 7, 10_000])
async def test_every_form_of_a_message_is_read(deflating: Instance, form: str, step: int) -> None:
    """Three times, so that nothing of one message is left to the next."""
    sent = FORMS[form]
    pings = 3 * sent.count(b"\x89\x81")
    stream = (sent + masked(Opcode.TEXT, b'{"type":"ping"}')) * 3
    async with raw_device(deflating) as raw:
        for at in range(0, len(stream), step):
            raw.write(stream[at : at + step])
            await asyncio.sleep(0)
        heard = [await raw.frame() for _ in range(6 + pings)]
        texts = [orjson.loads(data)["type"] for first, data in heard if first == 0x81]
        assert texts == ["pong"] * 6
        assert heard.count((0x8A, b"?")) == pings
        (device,) = deflating.running.instance.listener._connections
        assert device._core is None


UNFINISHED = masked(Opcode.TEXT, PING, rsv1=True, fin=False)

BREACHES = {
    "a bomb": (masked(Opcode.TEXT, BOMB, rsv1=True), 1009),
    "a bomb in fragments": (fragmented(BOMB, 50), 1009),
    "a binary bomb": (masked(Opcode.BINARY, BOMB, rsv1=True), 1009),
    "one byte too many": (masked(Opcode.TEXT, deflated(b" " * 65_537), rsv1=True), 1009),
    "too long, not compressed": (
        masked(Opcode.TEXT, b" " * 65_536, fin=False) + masked(Opcode.CONT, b" "),
        1009,
    ),
    "no deflate data": (masked(Opcode.TEXT, b"\xff\xff\xff\xff", rsv1=True), 1002),
    "a damaged end": (masked(Opcode.TEXT, PING[:-1] + b"\x07\x08", rsv1=True), 1002),
    "no UTF-8": (masked(Opcode.TEXT, deflated(b'"\xff"'), rsv1=True), 1007),
    "a compressed ping": (masked(Opcode.PING, b"?", rsv1=True), 1002),
    "RSV1 on a later fragment": (UNFINISHED + masked(Opcode.CONT, b"", rsv1=True), 1002),
    "a message within another": (UNFINISHED + masked(Opcode.TEXT, PING, rsv1=True), 1002),
    "a later fragment alone": (masked(Opcode.CONT, PING, rsv1=True), 1002),
    "RSV2": (bytes([0xE1]) + masked(Opcode.TEXT, PING)[1:], 1002),
    "what would be collected behind a final block": (
        masked(Opcode.TEXT, deflated(b"{", mode=zlib.Z_FINISH), rsv1=True, fin=False)
        + masked(Opcode.CONT, b"x" * 60_000, fin=False) * 10,
        1002,
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_what_breaks_the_rules_ends_the_connection(deflating: Instance, breach: str) -> None:
    sent, code = BREACHES[breach]
    async with raw_device(deflating) as raw:
        raw.write(sent)
        assert await raw.close_code() == code


async def test_without_an_agreement_a_compressed_message_breaks_the_rules(
    deflating: Instance,
) -> None:
    async with raw_device(deflating, offer="") as raw:
        raw.write(masked(Opcode.TEXT, PING, rsv1=True))
        assert await raw.close_code() == 1002


async def test_bombs_are_not_unpacked(deflating: Instance) -> None:
    """Of 200 MB that 40 devices send as 200 KB, nobody holds more than a few messages."""
    assert len(BOMB) < 5000
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        devices = [await enter(raw_device(deflating)) for _ in range(40)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for device in devices:
            device.write(masked(Opcode.TEXT, BOMB, rsv1=True))
        assert [await device.close_code() for device in devices] == [1009] * 40
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, f"{grown} KiB"


async def test_small_frames_that_unpack_to_the_limit_cost_what_messages_cost(
    deflating: Instance,
) -> None:
    """Each is within the limit: the budget of messages ends it."""
    async with raw_device(deflating) as raw:
        raw.write(masked(Opcode.TEXT, deflated(b" " * 65_536), rsv1=True) * 3000)
        assert await raw.close_code() == 4008
    assert deflating.running.instance.metrics.errors["MESSAGE_TOO_LARGE"] == 100


async def test_a_close_handshake_works_as_without(deflating: Instance) -> None:
    device = await connected(deflating, **offering())
    await device.close(1000, "bye")
    assert device.close_code == 1000
    metrics = deflating.running.instance.metrics
    await eventually(lambda: metrics.closed["1000"] == 1)
    device = await connected(deflating, **offering())
    await deflating.shut_down()
    with pytest.raises(ConnectionClosed):
        await device.recv()
    assert device.close_code == 1012
