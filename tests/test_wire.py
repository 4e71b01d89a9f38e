"""The words on the device socket, without a socket."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from wsgateway import wire
from wsgateway.wire import ABSENT, ErrorCode


@given(st.binary(max_size=70_000) | st.just(b"x" * 65_535) | st.just(b"x" * 65_536))
def test_a_text_frame_is_what_the_library_would_write(payload: bytes) -> None:
    assert wire.text_frame(payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)


def test_the_ping_frame_is_what_the_library_would_write() -> None:
    assert Frame(Opcode.PING, b"").serialize(mask=False) == wire.PING_FRAME


def test_a_timestamp_is_now_with_microseconds_and_offset() -> None:
    before = datetime.now(UTC)
    text = wire.timestamp()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", text)
    assert before <= datetime.fromisoformat(text) <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ('{"type":"ping"}', ("ping", ABSENT)),
        ('{"type":"ping","message":null}', ("ping", None)),
        ('{"type":"a","message":{"b":[1]},"timestamp":null}', ("a", {"b": [1]})),
        ('{"type":"a","timestamp":"2026-11-22T22:16:44.524Z"}', ("a", ABSENT)),
        ('{"type":"a","timestamp":"2026-11-22T22:16:44.524210+08:00"}', ("a", ABSENT)),
        ('{"type":"a","timestamp":"2026-11-22T22:16:44"}', ("a", ABSENT)),
        ('{"type":"a","unknown":1,"_reserved":2}', ("a", ABSENT)),
        ('{"type":"a","type":"b"}', ("b", ABSENT)),
        ('{"type":"\\u0000"}', ("\x00", ABSENT)),
        ('{"type":"a","message":' + "[" * 31 + "]" * 31 + "}", None),
    ],
)
def test_a_message_is_read(payload: str, expected: tuple[str, object] | None) -> None:
    found = wire.parse(payload.encode())
    assert expected is None or found == expected


@pytest.mark.parametrize(
    "payload",
    [
        "",
        " ",
        "{",
        "ping",
        "NaN",
        '{"type":"a","message":NaN}',
        '{"type":"a","message":Infinity}',
        '{"type":"a","message":1e400}',
        '{"type":"\\ud800"}',
        '\ufeff{"type":"a"}',
        '{"type":"a"}{}',
        '{"type":"a","message":' + "[" * 32 + "]" * 32 + "}",
        "[" * 33 + "]" * 33,
        "[" * 10_000,
        '{"a":' * 1000 + "1" + "}" * 1000,
    ],
)
def test_what_is_not_json_is_refused(payload: str) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.parse(payload.encode())
    assert caught.value.code is ErrorCode.INVALID_JSON
    assert caught.value.text == "Invalid JSON format"


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ("[]", "_schema"),
        ("1", "_schema"),
        ("null", "_schema"),
        ('"ping"', "_schema"),
        ("{}", "type"),
        ('{"type":null}', "type"),
        ('{"type":18446744073709551616}', "type"),
        ('{"type":["ping"]}', "type"),
        ('{"type":"a","timestamp":1}', "timestamp"),
        ('{"type":"a","timestamp":""}', "timestamp"),
        ('{"type":"a","timestamp":"yesterday"}', "timestamp"),
        ('{"type":"a","timestamp":"2026-11-22"}', "timestamp"),
    ],
)
def test_a_wrong_field_is_named(payload: str, field: str) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.parse(payload.encode())
    assert caught.value.code is ErrorCode.VALIDATION_ERROR
    reasons = orjson.loads(caught.value.text.removeprefix("Message validation error: "))
    assert list(reasons) == [field]
    assert all(isinstance(reason, str) for reason in reasons[field])


@given(st.binary())
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    try:
        kind, _ = wire.parse(payload)
    except wire.NotUtf8:
        with pytest.raises(UnicodeDecodeError):
            payload.decode()
    except wire.WireError:
        payload.decode()
    else:
        assert isinstance(kind, str)


@given(st.text(max_size=40), st.integers(0, 40))
def test_length_counts_characters_and_not_bytes(text: str, characters: int) -> None:
    assert wire.longer_than(text.encode(), characters) == (len(text) > characters)


def test_length_of_what_is_not_utf8_is_no_length() -> None:
    with pytest.raises(wire.NotUtf8):
        wire.longer_than(b"\xff" * 11, 10)


def test_an_unknown_type_is_repeated_up_to_64_characters() -> None:
    assert wire.unsupported("é" * 100).text == "Unsupported message type: " + "é" * 64
