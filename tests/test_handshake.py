"""The fast path and the library judge a request alike, whatever its bytes and however it is cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsgateway.config import Compression
from wsgateway.deflate import Deflate
from wsgateway.handshake import Malformed, Reader, Route, Visit, read_plain
from wsgateway.metrics import Metrics

KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = [b"Host: h", b"Upgrade: websocket", b"Connection: Upgrade", KEY]
VERSION = b"Sec-WebSocket-Version: 13"
FIRST = b"GET /ws/device/?token=K HTTP/1.1"
DATE = re.compile(rb"Date: [^\r]*\r\n")
PLAIN = b"\r\n".join([FIRST, *UPGRADE, VERSION, b"", b""])


DEFLATE = Deflate(Compression(enabled=True), Metrics())


def outcome(sent: bytes, cuts: list[int], deflate: Deflate | None, *, fast: bool) -> object:
    """What a request comes to, without dates; what follows it if it is complete."""
    reader = Reader(16_384, deflate, fast=fast)
    places = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]
    for start, end in pairwise(places):
        found = reader.feed(sent[start:end])
        if isinstance(found, Visit):
            # The library dates its answers; an informational one needs no date (RFC 9110, 6.6.1).
            return found._replace(answer=DATE.sub(b"", found.answer)), reader.rest + sent[end:]
        if found is not None:
            return found._replace(answer=DATE.sub(b"", found.answer))
    return None


paths = st.sampled_from(
    [b"/ws/device", b"/ws/device/", b"/ws/device/?token=K", b"/ws/device/7/?token=K",
     b"/ws/device/token/K%20/", b"/ws/device/token/", b"/ws/device?a=1&token=%41+b",
     b"/ws/devices", b"/healthz", b"/ws/device/?token=\xff", b"/ws/device/ x", b"/ws/device\t",
     b"/ws/device/99999999999999999999", b"http://h/ws/device/", b""]
)  # fmt: skip
odd = st.sampled_from(
    [b"Upgrade: WebSocket", b"Upgrade: h2c", b"Upgrade: h2c, websocket", b"upgrade:websocket",
     b"Connection: keep-alive, Upgrade", b"Connection: upgrade", b"Connection: close",
     b"Connection: a b;c", b"Connection: Upgrade,", b"Connection: , Upgrade",
     b"Sec-WebSocket-Version: 8", b"Sec-WebSocket-Version:  13 ", b"Sec-WebSocket-Version:\t13",
     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZR==", b"Sec-WebSocket-Key: dGhl", KEY + b"=",
     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ-=", b"Sec-WebSocket-Key:" + KEY[18:] + b"\xff",
     b"Sec-WebSocket-Protocol: wsgateway.v1", b"Sec-WebSocket-Protocol: wsgateway.v1, token.K2",
     b"Sec-WebSocket-Protocol: token.K2,wsgateway.v1,", b"Sec-WebSocket-Protocol: a b",
     b"Sec-WebSocket-Protocol: ", b"Sec-WebSocket-Protocol: a,  wsgateway.v1", b"Sec-WebSocket-Protocol: ,",
     b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
     b"Sec-WebSocket-Extensions: permessage-deflate", b"Sec-WebSocket-Extensions:",
     b"sec-websocket-extensions:permessage-deflate; server_max_window_bits=9 ",
     b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=8, x-a",
     b"Sec-WebSocket-Extensions: permessage-deflate;", b"Sec-WebSocket-Extensions: a b",
     b"Authorization: Token K3", b"Authorization: bearer  K4 ", b"Authorization: Basic eA==",
     b"Authorization:", b"Origin: https://a", b"Origin: \xe9", b"Origin:", b"Content-Length: 0",
     b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X-A_b: c", b"No colon", b"Nocolon",
     b" folded", b"X : y", b": y", b"X: a\0b", b"X: a\x1bb", b"X: a\rb", b"X: a\nb", b"X: \x7f",
     b"X: " + b"y" * 9000, b"X: y\r\n" * 130 + b"X: y", b"\xe9: y", b"X\xb2: y", b""]
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A good request with some of its lines replaced, repeated, added or left out."""
    lines = [*UPGRADE, VERSION]
    for line in draw(st.lists(odd, max_size=3)):
        name = line.partition(b":")[0].lower()
        known = [n for n, each in enumerate(lines) if each.partition(b":")[0].lower() == name]
        if known and draw(st.booleans()):
            lines[known[0]] = line
        else:
            lines.insert(draw(st.integers(0, len(lines))), line)
    if draw(st.integers(0, 9)) == 0:
        del lines[draw(st.integers(0, len(lines) - 1))]
    method = draw(st.sampled_from([b"GET"] * 8 + [b"POST", b"HEAD", b"get", b""]))
    version = draw(st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/2", b"http/1.1"]))
    first = b" ".join([method, draw(paths), version])
    ends = draw(st.sampled_from([b"\r\n"] * 8 + [b"\n"]))
    sent = ends.join([first, *lines, b"", b""])
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=1)):
        if draw(st.booleans()):
            sent = sent[:at] + bytes([byte]) + sent[at + 1 :]
    return sent + draw(st.sampled_from([b"", b"\x81\x80abcd", b"\r\n\r\n"]))


@given(requests(), st.lists(st.integers(0, 400), max_size=4))
@example(PLAIN, [])
@example(PLAIN, [len(PLAIN) - 1])
@example(PLAIN.replace(b"Host: h", b"Sec-WebSocket-Protocol: wsgateway.v1, token.K"), [])
@pytest.mark.parametrize("deflate", [None, DEFLATE])
def test_the_fast_path_and_the_library_judge_a_request_alike(
    deflate: Deflate | None, sent: bytes, cuts: list[int]
) -> None:
    slow = outcome(sent, cuts, deflate, fast=False)
    assert outcome(sent, cuts, deflate, fast=True) == slow
    assert outcome(sent, [], deflate, fast=True) == outcome(sent, [], deflate, fast=False)


@pytest.mark.parametrize("deflate", [None, DEFLATE])
def test_what_common_clients_send_takes_the_fast_path(deflate: Deflate | None) -> None:
    browser = PLAIN.replace(b"Connection: Upgrade", b"Connection: keep-alive, Upgrade").replace(
        b"Host: h",
        b"Host: h\r\nPragma: no-cache\r\nOrigin: https://a.example\r\nSec-WebSocket-Extensions: "
        b"permessage-deflate; client_max_window_bits\r\nSec-WebSocket-Protocol: wsgateway.v1",
    )
    for sent in (PLAIN, browser):
        visit = read_plain(sent, deflate)
        assert visit is not None
        assert (visit.route, visit.token, visit.valid) == (Route.DEVICE, "K", True)
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in visit.answer  # RFC 6455, section 1.3


@pytest.mark.parametrize("size", [16_384, 16_385])
def test_a_request_may_be_as_long_as_the_limit(size: int) -> None:
    lines = (size - len(PLAIN)) // 4000
    sent = PLAIN[:-2] + b"".join(b"X: " + b"y" * 3995 + b"\r\n" for _ in range(lines)) + b"\r\n"
    sent = sent[:-4] + b"y" * (size - len(sent)) + b"\r\n\r\n"
    found = Reader(16_384).feed(sent)
    assert isinstance(found, Visit if size == 16_384 else Malformed)
