"""One device's bytes: an asyncio.Protocol around the library's Sans-I/O core.

Only this module turns bytes into messages and back. It knows neither Redis nor SQL nor who may
connect: the door decides that, the session decides what a message means.

The common frame takes a fast path (see `_read_plain`); everything else goes through the core,
`websockets.protocol.Protocol`, which also answers pings and closes. A connection has a core only
while it needs one: nearly all devices never do. The library's own asyncio layer is not used
because a peer that stops reading stops it from closing, from pinging and from bounding what waits
to be sent; here every wait has a deadline that ends in `transport.abort()`.
Longer than 400 lines because a connection's phases share its state.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Mapping
from random import getrandbits
from time import monotonic
from typing import Any, Protocol, cast

from websockets.frames import Frame, Opcode, apply_mask  # type: ignore[attr-defined]
from websockets.protocol import SEND_EOF, Side, State
from websockets.protocol import Protocol as Core

from wsgateway import handshake, wire
from wsgateway.auth import Identity
from wsgateway.config import Limits
from wsgateway.deflate import Deflate, Inflate
from wsgateway.handlers import Reach
from wsgateway.handshake import Malformed, Reader, Visit
from wsgateway.metrics import Metrics
from wsgateway.providers import History, Services
from wsgateway.proxy import Networks
from wsgateway.session import Action, Session, Stop, Wait
from wsgateway.wire import CloseCode, Framing

log = logging.getLogger(__name__)

CORE_SLICE = 4096
"""Bytes given to the core at once: 682 of the smallest frames, about 10 ms in pure Python, after
which the limits are looked at again. A read can hold 256 KiB."""

CLOSING_BYTES = 131_072
"""Bytes that a peer may still send after our close frame, as some messages may be on the way."""

INFLATE_SLICE = 512
"""The same where compression was agreed on: 8 of the smallest frames that inflate to 64 KiB, which
are held so if reading pauses."""

FRAMES_PER_LOOK = 256
"""Plain frames handled between two looks at the clock, about 2 ms."""

READ_SECONDS = 0.02
"""How long one read may be handled before others get their turn; the rest of it is held."""

PAUSE_AT = 16_384
"""Bytes waiting in the transport above which a connection counts as congested and is watched."""

TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
CONTROL = frozenset({Opcode.PING, Opcode.PONG})


def _new_core(max_size: int) -> Core:
    return Core(Side.SERVER, state=State.OPEN, max_size=max_size, logger=handshake.CORE_LOG)


def _at_rest(core: Core) -> bool:
    """Whether an open core is between two messages: without it nothing would be lost.

    Its buffer does not say so, which is empty also after the first bytes of a frame were taken.
    """
    parser: Any = core.parser
    waits_for_a_frame = parser.gi_yieldfrom.__name__ == "at_eof"
    return core.state is State.OPEN and core.current_size is None and waits_for_a_frame


def _core_is_known() -> bool:
    """Whether the undocumented attributes that `_at_rest` reads are there and mean what they did."""
    core = _new_core(100)
    rests = []
    try:
        for part in (b"", b"\x81", b"\x81", b"abcd", b"e", b"\x01\x80abcd", b"\x80\x80", b"abcd"):
            core.receive_data(part)
            rests.append(_at_rest(core))
    except AttributeError:
        return False
    return rests == [True, False, False, False, True, False, False, True]


FAST_PATH = _core_is_known()
"""Whether plain frames bypass the core; without, everything works and is slower."""


class Phase(enum.Enum):
    """Where a connection stands."""

    HANDSHAKE = "handshake"  # the request is not complete
    DECIDING = "deciding"  # the door decides whether the device may come in
    OPEN = "open"
    CLOSING = "closing"  # a close frame or a refusal is on its way; nothing else follows
    CLOSED = "closed"


HANDSHAKE, DECIDING, OPEN, CLOSING, CLOSED = Phase
"""The phases by name: to look one up in its class costs as much as a small function."""


class Door(Protocol):
    """What a connection needs from the one who let it in."""

    limits: Limits
    deflate: Deflate | None
    max_pending: int
    metrics: Metrics
    services: Services
    proxies: Networks | None

    @property
    def gateway(self) -> Reach: ...
    def moved(self, connection: Connection, address: str) -> None: ...
    def arrived(self, connection: Connection) -> None: ...
    def requested(self, connection: Connection, visit: Visit) -> None: ...
    def congested(self, connection: Connection) -> None: ...
    def closing(self, connection: Connection) -> None: ...
    def lost(self, connection: Connection) -> None: ...
    def spawn(self, connection: Connection) -> asyncio.Task[None]: ...


class Connection(asyncio.Protocol):
    """A device's connection, from the accepted socket to its end; also the handlers' `Device`."""

    __slots__ = (
        "_close_code",
        "_closing_bytes",
        "_congested",
        "_control_frames",
        "_core",
        "_corked",
        "_door",
        "_drained",
        "_early",
        "_fragments",
        "_held",
        "_metrics",
        "_paused",
        "_pending",
        "_progress_at",
        "_request",
        "_session",
        "_silent_pings",
        "_task",
        "_transport",
        "_written",
        "address",
        "frame",
        "heard_at",
        "history",
        "id",
        "identity",
        "messages",
        "opened_at",
        "phase",
        "versioned",
        "wheel_slot",
    )

    def __init__(self, door: Door, address: str = "", accepted_at: float = 0.0) -> None:
        self._door = door
        self._metrics = door.metrics
        self.id = f"{getrandbits(128):032x}"
        """Names this connection, over all instances."""
        self.phase = HANDSHAKE
        self.address = address
        """The device's, as far as known: what a trusted proxy told, else the TCP peer's."""
        self.identity: Identity | None = None
        self.history: History | None = None
        self.versioned = False
        """Whether the client offered `wsgateway.v1`."""
        self.frame: Framing = wire.text_frame
        """What makes a frame of a message to it; as it is unless compression was agreed on."""
        self.heard_at = self.opened_at = accepted_at or monotonic()
        self.messages = 0
        self.wheel_slot = 0
        self._session: Session | None = None
        self._core: Core | None = None
        self._request: Reader | None = Reader(door.limits.handshake_bytes, door.deflate)
        self._early = b""
        self._held: deque[bytes | Frame] | None = None
        self._paused = False
        self._fragments: list[bytes] | None = None
        self._pending: deque[Wait] | None = None
        self._task: asyncio.Task[None] | None = None
        self._corked: list[bytes] | None = None
        self._congested = False
        self._written = self._drained = 0
        self._progress_at = 0.0
        self._control_frames = self._silent_pings = 0
        self._closing_bytes = 0
        self._close_code = 0

    # What the door and the handlers see.

    @property
    def user_id(self) -> int:
        assert self.identity is not None
        return self.identity.user_id

    @property
    def device_id(self) -> int | None:
        assert self.identity is not None
        return self.identity.device_id

    @property
    def token_hash(self) -> str:
        assert self.identity is not None
        return self.identity.token_hash

    @property
    def services(self) -> Services:
        return self._door.services

    @property
    def gateway(self) -> Reach:
        return self._door.gateway

    @property
    def busy(self) -> bool:
        """Whether one of its messages waits for an answer."""
        return self._task is not None

    @property
    def session(self) -> Session | None:
        """What the device may do; None before it is let in and after it is lost."""
        return self._session

    @property
    def close_code(self) -> int:
        """Why it ended: our code or the peer's; 1006 where no close frame was exchanged."""
        return self._close_code or 1006

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message to this device; False if it is gone. Never waits."""
        sent = self._send_text(wire.encode(message))
        self._metrics.sent["more"] += sent
        return sent

    def push(self, data: bytes) -> bool:
        """Put whole frames on the way; False if the device is gone or too slow. Never waits."""
        if self.phase is not OPEN or self._transport.is_closing():
            return False  # a reset is known to the transport a turn before it is to us
        self._write(data)
        return self.phase is OPEN

    def respond(self, answer: bytes) -> None:
        """Answer the request with something else than a WebSocket, and end."""
        if self.phase in (HANDSHAKE, DECIDING):
            self._write(answer)
            self._start_closing()
            self._end_of_output()

    def accept(self, answer: bytes) -> None:
        """Complete the handshake of a client that is to be told why it is refused."""
        if self.phase is DECIDING:
            self._write(answer)
            self.phase = OPEN

    def open(self, answer: bytes, identity: Identity, session: Session) -> None:
        """Complete the handshake, tell the device that it is connected, and begin to listen."""
        status = wire.connection_status(identity.user_id, identity.device_id)
        self.identity = identity
        self._session = session
        self.phase = OPEN
        self.opened_at = monotonic()
        self._metrics.sent["connection_status"] += 1
        self._metrics.compression_agreed += self.frame is not wire.text_frame
        self._write(answer + self.frame(status))

    def listen(self) -> None:
        """Begin to read messages, those first that came before the answer."""
        early, self._early = self._early, b""
        if self.phase is OPEN:
            if early:
                self._read(early, monotonic())
            if not self._paused:
                self._transport.resume_reading()

    def close(self, code: CloseCode, reason: str = "") -> None:
        """Start the close handshake. The door aborts a peer that does not finish it in time."""
        if self.phase is OPEN and (self._core is None or self._core.state is State.OPEN):
            self._close_code = code
            self._wake_core().send_close(code, reason)
            self._start_closing()

    def abort(self, reason: str) -> None:
        """Cut the connection now: the only end that a stalled peer cannot delay."""
        if self.phase is not CLOSED:
            self._metrics.aborted[reason] += 1
            self.phase = CLOSED
            self._transport.abort()

    def keepalive(self, allowed: int) -> bool:
        """Ping the device; False if it left ``allowed`` pings unanswered. Resets its budgets."""
        self._control_frames = 0
        if self.phase is not OPEN or self._paused:
            return True  # closing has a deadline of its own; a paused peer could not be heard
        if self._silent_pings >= allowed:
            return False
        self._silent_pings += 1
        self._write(wire.PING_FRAME)
        return True

    def stalled(self, now: float, longest: float) -> bool:
        """Whether nothing left the write buffer for ``longest`` seconds."""
        drained = self._written - self._transport.get_write_buffer_size()
        if drained > self._drained:
            self._drained = drained
            self._progress_at = now
        return now - self._progress_at > longest

    @property
    def is_congested(self) -> bool:
        return self._congested and self.phase is not CLOSED

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=PAUSE_AT, low=0)
        if not self.address:
            peer = transport.get_extra_info("peername")
            self.address = str(peer[0]) if peer else "unknown"
        self._door.arrived(self)

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        self._silent_pings = 0  # any bytes are a sign of life
        self.heard_at = now
        self._metrics.received_bytes += len(data)
        if self._session is not None and self.phase is OPEN:
            if self._paused:
                assert self._held is not None
                self._held.append(data)
            else:
                self._read(data, now)
        elif self.phase is HANDSHAKE:
            self._read_handshake(data)
        elif self.phase is DECIDING:
            self._early += data
            self._transport.pause_reading()
        else:
            self._read_rest(data)

    def eof_received(self) -> bool:
        # TLS has no half-closed connections: its end of input is the end.
        if self.phase is DECIDING and self._transport.can_write_eof():
            self._transport.pause_reading()  # and read the end again once there is an answer
            return True
        return False

    def pause_writing(self) -> None:
        self._congested = True
        self._progress_at = monotonic()
        self._drained = self._written - self._transport.get_write_buffer_size()
        self._door.congested(self)

    def resume_writing(self) -> None:
        self._congested = False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.phase = CLOSED
        if self._task is not None:
            self._task.cancel()
        self._door.lost(self)
        self._session = self._pending = self._held = self._core = None
        self._request = self.history = None

    # Reading.

    def _read_handshake(self, data: bytes) -> None:
        assert self._request is not None
        asked = self._request.feed(data)
        if isinstance(asked, Malformed):
            self._metrics.refused[asked.reason] += 1
            self.respond(asked.answer)
        elif asked is not None:
            self.phase = DECIDING
            self.versioned = asked.versioned
            if asked.window_bits:
                assert self._door.deflate is not None
                self.frame = self._door.deflate.framings[asked.window_bits]
            self._early = self._request.rest
            proxies = self._door.proxies
            if proxies is not None:
                told = proxies.client(self.address, self._request.forwarded_for())
                self._door.moved(self, told)
            self._request = None
            self._door.requested(self, asked)

    def _read(self, data: bytes, now: float) -> None:
        """Handle what was read while OPEN, and answer all of it with one write.

        What is left when reading pauses is held.
        """
        position = self._read_plain(data, now)
        if position < len(data):
            self._read_through_core(data, position, now)
        if self._corked is not None:
            self._uncork()

    def _read_through_core(self, data: bytes, position: int, now: float) -> None:
        if self._corked is None:
            self._corked = []
        core = self._wake_core()
        size = INFLATE_SLICE if core.extensions else CORE_SLICE
        for start in range(position, len(data), size):
            if not self._paused and monotonic() - now > READ_SECONDS:
                self._pause()
                asyncio.get_running_loop().call_soon(self._take_turn)
            if self._paused:
                assert self._held is not None
                self._held.append(data[start:])
                return
            if self.phase is not OPEN:
                self._read_rest(data[start:])
                return
            core.receive_data(data[start : start + size])
            self._handle_frames(core, now)
        if FAST_PATH and _at_rest(core):
            core.parser.close()  # refers to the core: both would wait for a garbage collection
            self._core = None

    def _wake_core(self) -> Core:
        if self._core is None:
            self._core = _new_core(self._door.limits.message_bytes)
            if self.frame is not wire.text_frame:
                self._core.extensions = [Inflate()]
        return self._core

    def _read_plain(self, data: bytes, now: float) -> int:
        """The fast path: handle the complete plain text frames that a read starts with, or a pong.

        Plain is final, masked, without RSV bits, shorter than 64 KiB and under the cap, with no
        core that is in the middle of something (RFC 6455, sections 5.1 to 5.6, hold as the core
        would have done the same).

        Returns:
            The position of the first byte that is not handled.

        """
        if self._core is not None or not FAST_PATH:
            return 0
        position, end, cap, handled = 0, len(data), self._door.limits.message_bytes, 0
        if end == 6 and data[0] == 0x8A and data[1] == 0x80:
            self._count_control_frame()  # the answer to our ping, which comes alone
            return end
        while end - position >= 6 and data[position] == 0x81:
            length = data[position + 1] - 0x80
            start = position + 2
            if length == 126:
                length = int.from_bytes(data[start : start + 2], "big")
                start += 2
            elif not 0 <= length < 126:
                break
            stop = start + 4 + length
            if stop > end or length > cap:
                break
            position = stop
            if stop < end and self._corked is None:
                self._corked = []  # more follows: its answers join this one's
            self._handle_text(apply_mask(data[start + 4 : stop], data[start : start + 4]), now)
            handled += 1
            late = handled % FRAMES_PER_LOOK == 0 and monotonic() - now > READ_SECONDS
            if late or self._paused or self.phase is not OPEN:
                break
        return position

    def _read_rest(self, data: bytes) -> None:
        """After our close frame, look for the peer's only, and not for long."""
        core = self._core
        if core is None:
            return  # the request was refused; what follows it is nobody's
        self._closing_bytes += len(data)
        if self._closing_bytes > CLOSING_BYTES:
            self.abort("flood")
            return
        for start in range(0, len(data), CORE_SLICE):
            if self.phase is not CLOSING or self._transport.is_closing():
                return
            core.receive_data(data[start : start + CORE_SLICE])
            core.events_received()
            if SEND_EOF in core.data_to_send():  # pongs are not for who was told to go
                self._end_of_output()

    def _handle_frames(self, core: Core, now: float) -> None:
        frames = core.events_received()
        for index, frame in enumerate(frames):
            if self._paused:
                assert self._held is not None
                self._held.extend(cast(list[Frame], frames[index:]))
                break
            self._handle_frame(cast(Frame, frame), now)
        self._flush()  # after the answers: pongs, and the close frame, which is the last
        if core.state is State.CLOSING and self.phase is OPEN:
            sent = core.close_sent
            self._close_code = sent.code if sent else 0
            self._start_closing()

    def _handle_frame(self, frame: Frame, now: float) -> None:
        opcode = frame.opcode
        if opcode in CONTROL:
            self._count_control_frame()
        elif opcode is Opcode.CLOSE or self.phase is not OPEN or self._session is None:
            return
        elif opcode is TEXT and frame.fin:
            self._handle_text(bytes(frame.data), now)
        elif opcode is BINARY and frame.fin:
            self._perform(self._session.receive_binary(now))
        else:
            self._handle_fragment(frame, now)

    def _count_control_frame(self) -> None:
        self._control_frames += 1
        if self._control_frames > self._door.limits.control_frames:
            self.close(CloseCode.RATE_LIMITED, "too many control frames")

    def _handle_fragment(self, frame: Frame, now: float) -> None:
        if self._fragments is None:
            # The first item says what the fragments are of: the core checks their sequence.
            self._fragments = [b"" if frame.opcode is TEXT else b"binary"]
        self._fragments.append(bytes(frame.data))
        if len(self._fragments) - 1 > self._door.limits.fragments:
            self._fail(CloseCode.TOO_BIG, "too many fragments")
        elif frame.fin:
            kind, *parts = self._fragments
            self._fragments = None
            assert self._session is not None
            if kind:
                self._perform(self._session.receive_binary(now))
            else:
                self._handle_text(b"".join(parts), now)

    def _handle_text(self, payload: bytes, now: float) -> None:
        assert self._session is not None
        self.messages += 1
        try:
            action = self._session.receive_text(payload, now)
        except wire.NotUtf8:
            self._fail(CloseCode.INVALID_UTF8, "invalid UTF-8")
            return
        if type(action) is not bytes:
            self._perform(action)
        elif self.phase is OPEN:
            self._write(self.frame(action))

    def _perform(self, action: Action) -> None:
        if type(action) is bytes:
            self._send_text(action)
        elif type(action) is Wait:
            self._wait(action)
        elif type(action) is Stop:
            self._send_text(action.payload)
            self.close(action.code)

    # Handlers that wait.

    def _wait(self, wait: Wait) -> None:
        if self._pending is None:
            self._pending = deque()
        self._pending.append(wait)
        if self._task is None:
            self._task = self._door.spawn(self)
        elif len(self._pending) >= self._door.max_pending and not self._paused:
            self._metrics.paused += 1
            self._pause()

    def _pause(self) -> None:
        self._paused = True
        self._held = deque()
        self._transport.pause_reading()

    def _take_turn(self) -> None:
        """Go on with a read that took long, unless the handlers are behind as well."""
        behind = self._pending and len(self._pending) >= self._door.max_pending
        if self._paused and self.phase is OPEN and not behind:
            self._resume()

    async def work(self) -> None:
        """Answer the pending messages, one at a time and in order. Ends when none is left."""
        try:
            while self._pending and self._session is not None:
                wait = self._pending.popleft()
                started = monotonic()
                answer = await self._session.run(wait)
                self._metrics.handler_seconds.note(wait.handler.type, monotonic() - started)
                if answer is not None:
                    self._send_text(answer)
                if self._paused and len(self._pending) < self._door.max_pending:
                    self._resume()
        finally:
            self._task = None

    def _resume(self) -> None:
        """Handle what was held; then, if that did not pause again, go on reading."""
        held, self._held = self._held, None
        self._paused = False
        self._silent_pings = 0  # nothing could be heard while reading was paused
        self._handle_held(held or deque(), monotonic())
        if not self._paused and self.phase is OPEN:
            self._transport.resume_reading()

    def _handle_held(self, held: deque[bytes | Frame], now: float) -> None:
        while held and self.phase is OPEN:
            if self._paused:
                assert self._held is not None
                self._held.extend(held)
                return
            item = held.popleft()
            if isinstance(item, bytes):
                self._read(item, now)
            else:
                self._handle_frame(item, now)

    # Writing.

    def _send_text(self, payload: bytes) -> bool:
        return self.push(self.frame(payload))

    def _write(self, data: bytes) -> None:
        if self._corked is not None:
            self._corked.append(data)
            return
        if self._transport.is_closing():
            return  # uvloop raises where asyncio ignores
        if self._congested and self._too_slow(len(data)):
            self.abort("slow")
            return
        self._written += len(data)
        self._metrics.sent_bytes += len(data)
        self._transport.write(data)
        if self._congested and self._too_slow():
            self.abort("slow")

    def _too_slow(self, more: int = 0) -> bool:
        waiting = self._transport.get_write_buffer_size() + more
        return waiting > self._door.limits.outbound_bytes

    def _uncork(self) -> None:
        """Write what was kept back while reading."""
        corked, self._corked = self._corked, None
        if corked:
            self._write(corked[0] if len(corked) == 1 else b"".join(corked))

    def _flush(self) -> None:
        """Write what the core wants to say."""
        for data in self._core.data_to_send() if self._core else ():
            if self.phase is CLOSED or self._transport.is_closing():
                return
            if data:
                self._write(data)
            else:
                self._end_of_output()

    def _fail(self, code: CloseCode, reason: str) -> None:
        self._close_code = code
        self._wake_core().fail(code, reason)
        self._start_closing()

    def _start_closing(self) -> None:
        """Send the last words; whoever is still there after the deadline is aborted."""
        self.phase = CLOSING
        self._fragments = None
        if self._task is not None:
            self._task.cancel()
        self._paused = False
        self._flush()
        self._door.closing(self)
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _end_of_output(self) -> None:
        """Close, or half-close while the peer may still be sending: a full close with unread input
        would make the kernel reset the connection and take back what was just written."""
        self._uncork()
        if self._transport.is_closing():
            return
        if (self._core is None or not self._core.close_rcvd) and self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
