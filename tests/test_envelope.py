"""What instances say to each other through Redis is read as it was written, and nothing else is."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsgateway import envelope
from wsgateway.envelope import BadEnvelope, Beat, Envelope

MAX = 65_536

NAMES = st.from_regex(r"[A-Za-z0-9_.:-]{1,64}", fullmatch=True)
EPOCHS = st.from_regex(r"[0-9a-f]{8}\.[0-9]{1,9}", fullmatch=True)
SEQS = st.integers(1, envelope.MAX_SEQ)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)
CHANNELS = st.dictionaries(st.text(max_size=40), st.tuples(EPOCHS, SEQS), max_size=20)


@given(NAMES, EPOCHS, SEQS, st.sampled_from("qmk"), OBJECTS)
def test_a_message_is_read_as_it_was_sealed(
    origin: str, epoch: str, seq: int, kind: str, message: dict[str, Any]
) -> None:
    payload, message_id = orjson.dumps(message), envelope.new_id(kind)
    sealed = envelope.seal(origin, epoch, seq, message_id, payload)
    assert envelope.read(sealed, MAX) == Envelope(origin, epoch, seq, message_id, payload)


@given(NAMES, CHANNELS)
def test_a_beat_is_read_as_it_was_sealed(origin: str, used: dict[str, tuple[str, int]]) -> None:
    assert envelope.read(envelope.seal_beat(origin, used), MAX) == Beat(origin, used)


@given(OBJECTS, st.text())
def test_a_bare_message_keeps_its_meaning(message: dict[str, Any], kind: str) -> None:
    message = {**message, "type": kind}
    found = envelope.read(orjson.dumps(message, option=orjson.OPT_INDENT_2), MAX)
    assert isinstance(found, bytes)
    assert orjson.loads(found) == message


@given(
    st.sampled_from([b"", b"1 ", b"1 a e 1 m\n", b"1 a e 1 m\n{", b"b ", b"b a\n", b"{"]),
    st.binary(max_size=200) | JSON.map(orjson.dumps),
)
@example(b"b a\n", b'{"all": ["e", 1e308]}')
@example(b"b a\n", b'{"all": ["e", "' + b"9" * 5000 + b'"]}')
@example(b"b a\n", b"[" * 2000)
@example(b"", b"{" + b'"type":"x","a":' + b"[" * 2000)
@example(b"1 a e 9007199254740993 m\n", b"{}")
def test_no_bytes_do_more_than_be_refused(head: bytes, tail: bytes) -> None:
    try:
        found = envelope.read(head + tail, 150)
    except BadEnvelope:
        return
    if isinstance(found, Envelope):
        assert 1 <= found.seq <= envelope.MAX_SEQ
        assert len(found.payload) <= 150
        found.payload.decode()
    elif isinstance(found, Beat):
        assert all(1 <= last <= envelope.MAX_SEQ for _, last in found.used.values())
    else:
        assert isinstance(orjson.loads(found)["type"], str)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "header", id="nothing"),
        pytest.param(b"hello", "header", id="words"),
        pytest.param(b"[]", "header", id="a list"),
        pytest.param(b"2 a e 1 m\n{}", "header", id="another version"),
        pytest.param(b"1 a e 1 m{}", "header", id="no end of the header"),
        pytest.param(b"1 a e 0 m\n{}", "header", id="number nought"),
        pytest.param(b"1 a e 01 m\n{}", "header", id="number with a leading nought"),
        pytest.param(b"1 a e -1 m\n{}", "header", id="negative number"),
        pytest.param(b"1 a e 9007199254740993 m\n{}", "header", id="number not exact in JSON"),
        pytest.param(b"1 " + b"a" * 65 + b" e 1 m\n{}", "header", id="origin too long"),
        pytest.param("1 ä e 1 m\n{}".encode(), "header", id="origin not ASCII"),
        pytest.param(b"1 a e 1 " + b"m" * 97 + b"\n{}", "header", id="id too long"),
        pytest.param(b"1 a e 1 m\n", "header", id="no message"),
        pytest.param(b"1 a e 1 m\n[]", "header", id="a message that is no object"),
        pytest.param(b'1 a e 1 m\n{"a":"\xff"}', "utf8", id="no UTF-8"),
        pytest.param(b'1 a e 1 m\n{"a":"\xed\xa0\x80"}', "utf8", id="a surrogate"),
        pytest.param(b'1 a e 1 m\n{"a":"%s"}' % (b"x" * MAX), "size", id="message too long"),
        pytest.param(b'{"type":"%s"}' % (b"x" * MAX), "size", id="bare message too long"),
        pytest.param(b'{"type":"\xff"}', "utf8", id="bare message, no UTF-8"),
        pytest.param(b'{"type":"x"', "json", id="bare message, cut off"),
        pytest.param(b'{"type":NaN}', "json", id="bare message, NaN"),
        pytest.param(b"{}", "json", id="bare message without a type"),
        pytest.param(b'{"type":1}', "json", id="bare message, type is a number"),
        pytest.param(
            b'{"type":"x","m":%s1%s}' % (b"[" * 40, b"]" * 40), "json", id="bare message, too deep"
        ),
        pytest.param(b"b a", "beat", id="beat without an end of its header"),
        pytest.param(b"b \n{}", "beat", id="beat of nobody"),
        pytest.param(b"b a\n[]", "beat", id="beat that is a list"),
        pytest.param(b"b a\n3", "beat", id="beat that is a number"),
        pytest.param(b'b a\n{"all":1}', "beat", id="beat without an epoch"),
        pytest.param(b'b a\n{"all":["e","x"]}', "beat", id="beat, number is a word"),
        pytest.param(b'b a\n{"all":["e",{}]}', "beat", id="beat, number is an object"),
        pytest.param(
            b"b a\n" + orjson.dumps({str(n): ["e", 1] for n in range(1001)}),
            "beat",
            id="beat of too many channels",
        ),
    ],
)
def test_what_is_no_envelope_is_refused_with_a_word(data: bytes, reason: str) -> None:
    with pytest.raises(BadEnvelope, match=f"^{reason}$"):
        envelope.read(data, MAX)


def test_the_longest_message_is_passed_on_and_one_byte_more_is_not() -> None:
    head, tail = b'{"type":"', b'"}'
    longest = head + b"x" * (MAX - len(head) - len(tail)) + tail
    sealed = envelope.seal("a", "e", 1, "m1", longest)
    assert envelope.read(sealed, MAX) == Envelope("a", "e", 1, "m1", longest)
    assert envelope.read(longest, MAX) == longest
    for data in (envelope.seal("a", "e", 1, "m1", longest + b" "), longest + b" "):
        with pytest.raises(BadEnvelope, match="size"):
            envelope.read(data, MAX)


def test_ids_differ_and_say_what_their_sender_wants() -> None:
    ids = {envelope.new_id(kind) for kind in "qmk" for _ in range(1000)}
    assert len(ids) == 3000
    assert all(re.fullmatch("[qmk][0-9a-f]{32}", one) for one in ids)
