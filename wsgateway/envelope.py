"""The words between instances: how a group's message travels through Redis.

Only this module says how they look. It takes bytes and returns values; it knows neither Redis nor
groups nor loops.

    1 <origin> <epoch> <seq> <id>\\n<JSON of the message>    a message of an instance
    b <origin>\\n{"<channel>": ["<epoch>", <last seq>], ...}    a beat: what it sent lately
    r <origin>\\n                                              it missed some: all are to beat anew
    {"type": ...}                                            a message of any other program

``origin`` is an instance's name, ``epoch`` random at its start. ``seq`` counts per origin, epoch
and channel from 1. The first letter of ``id`` says what the sender wants: a receipt (`m`), a receipt
for a message that its caller (`k`) or the queue (`i`) may repeat, or none (`q`). The id of a caller's
ends with a dot and a fingerprint of what it says.
"""

from __future__ import annotations

import enum
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson

from wsgateway import wire

QUIET: Final = "q"
ASKED: Final = "m"
KEYED: Final = "k"
ITEM: Final = "i"

MAX_SEQ: Final = 2**53
"""Larger numbers are not exact in every program's JSON."""

BEAT_CHANNELS: Final = 1000
"""Channels in one beat, about 30 KB: an instance sends as many beats as it needs."""

_HEADER = re.compile(
    rb"1 ([\w.:-]{1,64}) ([\w.-]{1,64}) ([1-9]\d{0,15}) ([\w.:-]{1,96})\n", re.ASCII
)
_RESYNC = re.compile(rb"r ([\w.:-]{1,64})\n", re.ASCII)
_BEAT = re.compile(rb"b ([\w.:-]{1,64})\n", re.ASCII)


class Fate(enum.Enum):
    """What became of what was sent to Redis."""

    TAKEN = "taken"  # Redis answered
    NOT_SENT = "not_sent"  # Redis never saw it
    REFUSED = "refused"  # Redis said no
    UNKNOWN = "unknown"  # sent, and no answer came


class Published(NamedTuple):
    """What became of a message for other instances, and which of them listen to its group."""

    fate: Fate
    listeners: frozenset[str] = frozenset()


class BadEnvelope(Exception):
    """Something on a channel that no instance may pass on; the text is a word for the metric."""


class Envelope(NamedTuple):
    """A message of an instance, with its JSON unread."""

    origin: str
    epoch: str
    seq: int
    id: str
    payload: bytes


class Beat(NamedTuple):
    """What an instance sent since its last beat: ``{channel: (epoch, last seq)}``."""

    origin: str
    used: dict[str, tuple[str, int]]


class Resync(NamedTuple):
    """An instance that missed beats."""

    origin: str


def new_id(kind: str) -> str:
    """An id that no other message has; its first letter says what the sender wants."""
    return kind + secrets.token_hex(16)


def seal(origin: str, epoch: str, seq: int, message_id: str, payload: bytes) -> bytes:
    """A message with its header."""
    return f"1 {origin} {epoch} {seq} {message_id}\n".encode() + payload


def seal_beat(origin: str, used: Mapping[str, tuple[str, int]]) -> bytes:
    """A beat; at most BEAT_CHANNELS channels."""
    return f"b {origin}\n".encode() + orjson.dumps(used)


def seal_resync(origin: str) -> bytes:
    """A word to all: this instance may have missed beats."""
    return f"r {origin}\n".encode()


def read(data: bytes, max_bytes: int) -> Envelope | Beat | Resync | bytes:
    """Read what came on a group's channel.

    Returns:
        An instance's message, whose payload is UTF-8 of at most ``max_bytes`` and otherwise unread;
        a beat; a wish for beats; or the JSON of any other program's message, checked and encoded anew.

    Raises:
        BadEnvelope: 'header', 'size', 'utf8', 'json' or 'beat'.

    """
    if data.startswith(b"1 "):
        header = _HEADER.match(data)
        if header is None:
            raise BadEnvelope("header")
        payload = data[header.end() :]
        _check_text(payload, max_bytes)
        origin, epoch, seq, message_id = header.groups()
        if int(seq) > MAX_SEQ or not payload.startswith(b"{"):
            raise BadEnvelope("header")
        return Envelope(origin.decode(), epoch.decode(), int(seq), message_id.decode(), payload)
    if data.startswith(b"b "):
        return _read_beat(data)
    if data.startswith(b"r "):
        word = _RESYNC.fullmatch(data)
        if word is None:
            raise BadEnvelope("beat")
        return Resync(word[1].decode())
    if data[:1] == b"{":
        _check_text(data, max_bytes)
        return _read_bare(data)
    raise BadEnvelope("header")


def _check_text(payload: bytes, max_bytes: int) -> None:
    """One message that is no UTF-8 would end the connection of everybody in the group (1007)."""
    if len(payload) > max_bytes:
        raise BadEnvelope("size")
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise BadEnvelope("utf8") from None


def _read_bare(data: bytes) -> bytes:
    try:
        document = wire.read_object(data)
    except ValueError:
        raise BadEnvelope("json") from None
    if not isinstance(document.get("type"), str):
        raise BadEnvelope("json")
    return orjson.dumps(document)


def _read_beat(data: bytes) -> Beat:
    header = _BEAT.match(data)
    try:
        used: Any = orjson.loads(data[header.end() :]) if header else None
        if header is None or len(used) > BEAT_CHANNELS:
            raise ValueError
        entries = {
            channel: (str(epoch), int(seq))
            for channel, (epoch, seq) in used.items()
            if 0 < int(seq) <= MAX_SEQ
        }
    except (ValueError, TypeError, AttributeError):
        raise BadEnvelope("beat") from None
    return Beat(header[1].decode(), entries)
