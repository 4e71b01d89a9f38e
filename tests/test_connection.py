"""The fast path and the core say the same, whatever the bytes and wherever they are cut."""

from __future__ import annotations

import asyncio
import re
import weakref
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode, apply_mask  # type: ignore[attr-defined]

from wsgateway import config, connection, handlers
from wsgateway.auth import Identity
from wsgateway.connection import Connection
from wsgateway.deflate import Deflate
from wsgateway.handshake import Visit
from wsgateway.limits import Window
from wsgateway.metrics import Metrics
from wsgateway.session import Rules, Session

REQUEST = (
    b"GET /ws/device/ HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
OFFER = b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
DEFLATE = Deflate(config.Compression(enabled=True, min_bytes=1 << 20), Metrics())
LIMITS = config.Limits(messages=30, message_characters=50, message_bytes=1000, fragments=4)
RULES = Rules(handlers.load(()), LIMITS.message_characters, 5, Metrics())


class Wire(asyncio.Transport):
    """A transport whose peer reads everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.ended = False

    def write(self, data: Any) -> None:
        assert not self.ended
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def abort(self) -> None:
        self.ended = True

    close = abort

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class OpenDoor:
    """A door that lets everybody in."""

    limits = LIMITS
    max_pending = 16
    metrics = Metrics()
    services: Any = None
    gateway: Any = None
    proxies = None

    def __init__(self, deflate: Deflate | None = None) -> None:
        self.deflate = deflate

    def requested(self, device: Connection, visit: Visit) -> None:
        session = Session(RULES, Window(LIMITS.messages, 60), device)
        device.open(visit.answer, Identity(1, "", 1, 1, None, 1), session)
        device.listen()

    def arrived(self, device: Connection) -> None: ...
    def moved(self, device: Connection, address: str) -> None: ...
    def congested(self, device: Connection) -> None: ...
    def closing(self, device: Connection) -> None: ...
    def lost(self, device: Connection) -> None: ...
    def spawn(self, device: Connection) -> Any: ...


def answers(
    reads: Sequence[bytes], deflate: Deflate | None
) -> tuple[list[bytes], list[bytes], bool]:
    """What a connection writes for what it reads: messages without times, pongs, if it ended.

    Where one read holds two reasons to close, such as an invalid message and the peer's own close
    frame, the core has seen both before we judge the first: which code is sent, and whether pings
    between them are still answered, is then open.
    """
    device, wire = Connection(OpenDoor(deflate)), Wire()
    device.connection_made(wire)
    device.data_received(REQUEST[:-2] + OFFER)
    handshake_length = len(wire.written)
    for read in reads:
        device.data_received(read)
    times = re.compile(rb"\d{4}-\d\d-\d\dT[\d:.]+")
    said = times.sub(lambda time: b"T" * len(time[0]), bytes(wire.written[handshake_length:]))
    texts: list[bytes] = []
    pongs: list[bytes] = []
    closed, at = False, 0
    while at < len(said):
        assert not closed, "nothing may follow a close frame"
        opcode, length, at = said[at], said[at + 1], at + 2
        if length == 126:
            length, at = int.from_bytes(said[at : at + 2], "big"), at + 2
        closed = opcode == 0x88
        if not closed:
            (texts if opcode == 0x81 else pongs).append(said[at : at + length])
        at += length
    return texts, [] if closed else pongs, wire.ended


def masked(opcode: Opcode, data: bytes, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


PING = masked(Opcode.TEXT, b'{"type":"ping"}')
PONG = masked(Opcode.PONG, b"")


def deflated(data: bytes) -> bytes:
    """A compressed message."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


messages = st.sampled_from(
    [
        orjson.dumps({"type": "ping"}),
        orjson.dumps({"type": "ping", "message": "x" * 30}),
        orjson.dumps({"type": "sing", "message": {"song": "鱼"}}),
        orjson.dumps({"type": "nope", "message": "y" * 120}),
        b"{",
        b"",
        b"\xff\xfe",
        b"z" * 999,
        b"z" * 1001,
    ]
)
frames = st.one_of(
    messages.map(lambda data: masked(Opcode.TEXT, data)),
    messages.map(lambda data: masked(Opcode.TEXT, data)),
    st.tuples(
        st.sampled_from([Opcode.TEXT, Opcode.BINARY, Opcode.CONT]), messages, st.booleans()
    ).map(lambda parts: masked(*parts)),
    st.tuples(st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125)).map(
        lambda parts: masked(*parts)
    ),
    st.sampled_from([b"", b"\x03", b"\x03\xe8", b"\x03\xe9bye", b"\x03\xed", b"\x0f\xa1\xff"]).map(
        lambda data: masked(Opcode.CLOSE, data)
    ),
    messages.map(lambda data: Frame(Opcode.TEXT, data).serialize(mask=False)),
    messages.map(lambda data: b"\xc1" + masked(Opcode.TEXT, data)[1:]),  # with RSV1
    messages.map(lambda data: b"\xc1" + masked(Opcode.TEXT, deflated(data))[1:]),
    messages.map(lambda data: b"\x41" + masked(Opcode.TEXT, deflated(data)[:9])[1:])
    | messages.map(lambda data: masked(Opcode.CONT, deflated(data)[9:])),
    st.just(b"\x81\xfe\x00\x02abcd" + b"{}"),  # a length that is longer than it need be
    st.just(b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff"),
    st.binary(max_size=20),
)


@given(st.lists(frames, max_size=40), st.lists(st.integers(0, 3000), max_size=12))
@example([masked(Opcode.TEXT, b'{"type":"ping"}')] * 40, [])
@pytest.mark.parametrize("deflate", [None, DEFLATE])
def test_the_fast_path_and_the_core_say_the_same(
    deflate: Deflate | None, frames: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(frames)
    places = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    reads = [stream[a:b] for a, b in pairwise(places) if a < b]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "READ_SECONDS", 60)  # no loop runs that could take turns
        fast = answers(reads, deflate)
        patch.setattr(connection, "FAST_PATH", False)
        slow = answers(reads, deflate)
    assert fast == slow


def test_this_library_has_what_the_fast_path_reads() -> None:
    assert connection.FAST_PATH


def test_frames_that_come_with_the_request_are_answered() -> None:
    device, wire = Connection(OpenDoor()), Wire()
    device.connection_made(wire)
    device.data_received(REQUEST + masked(Opcode.TEXT, b'{"type":"ping"}') + b"\x81")
    device.data_received(masked(Opcode.TEXT, b'{"type":"ping"}')[1:])
    assert bytes(wire.written).count(b'"pong"') == 2


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_frame_whose_rest_looks_like_a_frame_is_read_as_one(cut: int) -> None:
    """Its mask and its payload begin as a plain frame does."""
    mask = b"\x81\x80\x81\x80"
    sent = b"\x81\x8f" + mask + apply_mask(b'{"type":"ping"}', mask)
    device, wire = Connection(OpenDoor()), Wire()
    device.connection_made(wire)
    device.data_received(REQUEST)
    device.data_received(sent[:cut])
    device.data_received(sent[cut:] + sent)
    assert bytes(wire.written).count(b'"pong"') == 2


def test_a_device_has_a_core_only_while_it_needs_one() -> None:
    device, wire = Connection(OpenDoor()), Wire()
    device.connection_made(wire)
    device.data_received(REQUEST)
    for parts in ([PING], [PONG], [PING[:3], PING[3:]], [PING + PONG]):
        for part in parts:
            device.data_received(part)
        assert device._core is None
    device.data_received(masked(Opcode.TEXT, b"{", fin=False))
    assert device._core is not None


def test_a_core_that_is_not_needed_any_more_leaves_no_garbage() -> None:
    device, wire = Connection(OpenDoor()), Wire()
    device.connection_made(wire)
    device.data_received(REQUEST)
    device.data_received(PING[:3])
    core = weakref.ref(device._core)
    device.data_received(PING[3:])
    assert core() is None


def test_the_answers_to_one_read_are_one_write() -> None:
    writes = 0

    class CountingWire(Wire):
        def write(self, data: Any) -> None:
            nonlocal writes
            writes += 1
            super().write(data)

    device, wire = Connection(OpenDoor()), CountingWire()
    device.connection_made(wire)
    device.data_received(REQUEST)
    writes = 0
    device.data_received(masked(Opcode.TEXT, b'{"type":"ping"}') * 10)
    assert (writes, bytes(wire.written).count(b'"pong"')) == (1, 10)
