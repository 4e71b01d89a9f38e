"""The words on the device socket.

Only this module says how a message, an error and a frame look, and which codes exist. It takes
bytes and returns values; it knows neither users nor sockets nor loops.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from time import time_ns
from typing import Any, Final

import orjson

SUBPROTOCOL: Final = "wsgateway.v1"
"""Offered by clients that understand the close codes below."""

MAX_DEPTH: Final = 32
"""Nesting of a message: orjson reads 1,024 levels and writes 254, so more could not be sent on."""

MAX_TYPE_ECHO: Final = 64
"""Characters of an unknown type that are repeated to its sender."""

_SHORT_HEADERS: Final = tuple(bytes((0x81, length)) for length in range(126))

PING_FRAME: Final = b"\x89\x00"
"""An unmasked, empty ping (RFC 6455, section 5.5.2): the same bytes for everybody."""


Framing = Callable[[bytes], bytes]
"""What makes a frame of a message for some connection, such as `text_frame`."""

_from_iso: Final = datetime.fromisoformat
_SHALLOW: Final = 2 * MAX_DEPTH
"""Bytes within which a message cannot nest deeper: each level opens and closes."""


class CloseCode(enum.IntEnum):
    """Why a connection ends. The server never starts a close with 1000."""

    PROTOCOL_ERROR = 1002
    INVALID_UTF8 = 1007
    TOO_BIG = 1009
    NO_PONG = 1011
    RESTART = 1012
    CONNECT_FAILED = 4000
    TOKEN_ENDED = 4001
    DISCONNECTED = 4003
    RATE_LIMITED = 4008
    REPLACED = 4010


class ErrorCode(enum.StrEnum):
    """The ``code`` of an error message."""

    RATE_LIMITED = "RATE_LIMITED"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    UNSUPPORTED_DATA = "UNSUPPORTED_DATA"
    INVALID_JSON = "INVALID_JSON"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    UNSUPPORTED_TYPE = "UNSUPPORTED_TYPE"
    SERVICE_ERROR = "SERVICE_ERROR"
    INTERNAL_ERROR = "INTERNAL_ERROR"


class Absent(enum.Enum):
    """The value of a field that a message does not have, which is not the same as null."""

    ABSENT = 0


ABSENT: Final = Absent.ABSENT


class WireError(Exception):
    """A message that cannot be understood, as its sender is told."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class NotUtf8(Exception):
    """A text frame that is not UTF-8: the connection fails with 1007 (RFC 6455, section 8.1)."""


def timestamp() -> str:
    """Now, as every message carries it: ISO 8601, UTC, with microseconds and offset.

    As datetime.isoformat() says it, at a fifth of its price: all but the fraction is kept for the
    rest of its second.
    """
    second, nanoseconds = divmod(time_ns(), 1_000_000_000)
    return f"{to_the_second(second)}.{nanoseconds // 1000:06d}+00:00"


@lru_cache(maxsize=2)
def to_the_second(second: int) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, without fraction and offset; quick for the same one."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as JSON. Raises TypeError for what JSON cannot say."""
    return orjson.dumps(message)


def text_frame(payload: bytes) -> bytes:
    """An unmasked, final text frame (RFC 6455, section 5.2): the same bytes for every receiver."""
    length = len(payload)
    if length < 126:
        return _SHORT_HEADERS[length] + payload
    if length < 65536:
        return b"\x81\x7e" + length.to_bytes(2, "big") + payload
    return b"\x81\x7f" + length.to_bytes(8, "big") + payload


def compressed_frame(data: bytes) -> bytes:
    """The same with RSV1, for a message that is compressed already (RFC 7692, section 6)."""
    return b"\xc1" + text_frame(data)[1:]


def error(code: ErrorCode, text: str) -> bytes:
    """An error message to a device."""
    return encode({"type": "error", "message": text, "code": code, "timestamp": timestamp()})


def connection_status(user_id: int, device_id: int | None) -> bytes:
    """The first message of every connection."""
    return encode(
        {
            "type": "connection_status",
            "status": "connected",
            "user_id": str(user_id),
            "device_id": device_id,
            "timestamp": timestamp(),
        }
    )


def longer_than(payload: bytes, characters: int) -> bool:
    """Whether a payload has more code points than that. Raises NotUtf8."""
    if len(payload) <= characters:
        return False
    try:
        return len(payload.decode()) > characters
    except UnicodeDecodeError:
        raise NotUtf8 from None


def parse(payload: bytes) -> tuple[str, Any]:
    """Read a message of a device: ``{"type": str, "message": any, "timestamp": ISO time or null}``.

    Returns:
        Its type and its message, which is ABSENT where it has none.

    Raises:
        NotUtf8: the payload is not UTF-8.
        WireError: it is not JSON, or no message. NaN, lone surrogates and nesting over 32 are not
            JSON here, though other readers may take them.

    """
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError:
        try:
            payload.decode()
        except UnicodeDecodeError:
            raise NotUtf8 from None
        raise WireError(ErrorCode.INVALID_JSON, "Invalid JSON format") from None
    # Counting brackets is far cheaper than walking, and nearly every message ends here.
    if (
        len(payload) > _SHALLOW
        and payload.count(b"{") + payload.count(b"[") > MAX_DEPTH
        and _deeper_than(document, MAX_DEPTH)
    ):
        raise WireError(ErrorCode.INVALID_JSON, "Invalid JSON format")
    if type(document) is not dict:
        raise invalid({"_schema": ["Invalid input type."]})
    kind = document.get("type", ABSENT)
    if type(kind) is not str:
        reason = "Missing data for required field." if kind is ABSENT else "Not a valid string."
        raise invalid({"type": [reason]})
    sent_at = document.get("timestamp")
    if sent_at is not None and not _is_time(sent_at):
        raise invalid({"timestamp": ["Not a valid datetime."]})
    return kind, document.get("message", ABSENT)


def read_object(payload: bytes) -> dict[str, Any]:
    """A JSON object of a backend that can be sent on to devices. Raises ValueError for others."""
    document = orjson.loads(payload)
    if type(document) is not dict or _deeper_than(document, MAX_DEPTH):
        raise ValueError("no object, or nested too deeply")
    return document


def invalid(errors: Mapping[str, list[str]]) -> WireError:
    """The error for fields that break their schema, worded as marshmallow words it."""
    reasons = orjson.dumps(errors, option=orjson.OPT_NON_STR_KEYS).decode()
    return WireError(ErrorCode.VALIDATION_ERROR, f"Message validation error: {reasons}")


def unsupported(kind: str) -> WireError:
    """The error for a type that no handler answers."""
    return WireError(
        ErrorCode.UNSUPPORTED_TYPE, f"Unsupported message type: {kind[:MAX_TYPE_ECHO]}"
    )


def _is_time(value: Any) -> bool:
    if type(value) is not str:
        return False
    try:
        _from_iso(value)
    except ValueError:
        return False
    return len(value) > len("2026-11-22")  # a date alone is not a time


def _deeper_than(document: Any, depth: int) -> bool:
    level = [document]
    for _ in range(depth):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return any(isinstance(value, dict | list) for value in level)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
