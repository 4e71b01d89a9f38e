"""What proxies tell of their clients, and whom that is believed from."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsgateway.proxy import BINARY_BYTES, TEXT_BYTES, Header, InvalidHeader, Networks, parse

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
TLVS = b"\x03\x00\x04\x00\x00\x00\x00" + b"\x04\x00\x01\x00"


def text(line: str) -> bytes:
    return f"PROXY {line}\r\n".encode()


def binary(kind: int, addresses: bytes, command: int = 0x21) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(addresses)) + addresses


V4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("192.0.2.1") + b"\x30\x39\x00\x50"
V6 = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + b"\x30\x39\x00\x50"
)
MAPPED = socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.7") + V6[16:]

GOOD = {
    "tcp4": (text("TCP4 192.0.2.7 192.0.2.1 12345 80"), "192.0.2.7"),
    "tcp6": (text("TCP6 2001:DB8:0::7 2001:db8::1 12345 80"), "2001:db8::7"),
    "tcp6 of ipv4": (text("TCP6 ::ffff:192.0.2.7 ::1 12345 80"), "192.0.2.7"),
    "unknown": (text("UNKNOWN"), ""),
    "unknown with words": (text("UNKNOWN ffff::1 ffff::2 65535 65535"), ""),
    "inet": (binary(0x11, V4), "192.0.2.7"),
    "inet datagram": (binary(0x12, V4), "192.0.2.7"),
    "inet with extensions": (binary(0x11, V4 + TLVS), "192.0.2.7"),
    "inet6": (binary(0x21, V6), "2001:db8::7"),
    "inet6 with extensions": (binary(0x21, V6 + TLVS), "2001:db8::7"),
    "inet6 of ipv4": (binary(0x21, MAPPED), "192.0.2.7"),
    "unix": (binary(0x31, bytes(216)), ""),
    "unspecified": (binary(0x00, b""), ""),
    "unspecified with extensions": (binary(0x00, TLVS), ""),
    "local": (binary(0x00, b"", command=0x20), ""),
    "local with an address": (binary(0x11, V4, command=0x20), ""),
    "local of an unknown kind": (binary(0x77, b"abc", command=0x20), ""),
    "longest": (binary(0x11, V4 + bytes(BINARY_BYTES - 28)), "192.0.2.7"),
}


@pytest.mark.parametrize(("header", "address"), GOOD.values(), ids=GOOD)
def test_a_header_is_read_wherever_it_is_cut_and_not_a_byte_more(
    header: bytes, address: str
) -> None:
    for cut in range(len(header)):
        assert parse(header[:cut]) is None
    assert parse(header) == Header(len(header), address)
    assert parse(header + b"GET / HTTP/1.1\r\n\r\n") == Header(len(header), address)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /ws/device HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"proxy TCP4 192.0.2.7 192.0.2.1 1 2\r\n",
        text("TCP4 192.0.2.7 192.0.2.1 1"),
        text("TCP4 192.0.2.7 192.0.2.1 1 2 3"),
        text("TCP4 192.0.2.7 192.0.2.1 1 65536"),
        text("TCP4 192.0.2.7 192.0.2.1 1 -2"),
        text("TCP4 192.0.2.256 192.0.2.1 1 2"),
        text("TCP4 2001:db8::7 2001:db8::1 1 2"),
        text("TCP4 192.0.2.7  192.0.2.1 1 2"),
        text("TCP6 192.0.2.7 192.0.2.1 1 2"),
        text("TCP6 fe80::1%\x1b[31m ::1 1 2"),
        text("TCP4 １９２.0.2.7 192.0.2.1 1 2"),
        text("UDP4 192.0.2.7 192.0.2.1 1 2"),
        text("TCP4"),
        b"PROXY TCP4 " + b"1" * TEXT_BYTES,
        b"PROXY UNKNOWN " + b"x" * (TEXT_BYTES - 15) + b"\r\n",
        binary(0x11, V4, command=0x11),
        binary(0x11, V4, command=0x22),
        binary(0x13, V4),
        binary(0x41, V4),
        binary(0x11, V4[:-1]),
        binary(0x21, V4),
        binary(0x31, bytes(215)),
        SIGNATURE + b"\x21\x11\xff\xff",
        SIGNATURE + struct.pack("!BBH", 0x20, 0, BINARY_BYTES - 15),
    ],
)
def test_what_is_no_header_is_refused_before_more_than_a_header_came(data: bytes) -> None:
    with pytest.raises(InvalidHeader):
        parse(data)


@given(st.binary(max_size=BINARY_BYTES + 64) | st.binary(max_size=600).map(SIGNATURE.__add__))
@example(b"")
@example(SIGNATURE)
def test_bytes_are_a_header_or_none_and_never_wait_for_more_than_the_longest(data: bytes) -> None:
    try:
        header = parse(data)
    except InvalidHeader:
        return
    if header is None:
        assert len(data) < BINARY_BYTES
    else:
        assert header.length <= min(len(data), BINARY_BYTES)


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6), st.integers(0, 65535), st.binary(max_size=99))
def test_every_address_comes_through_in_both_versions(
    address: object, port: int, more: bytes
) -> None:
    source = ip_address(str(address))
    plain = str(getattr(source, "ipv4_mapped", None) or source)
    packed = source.packed * 2 + struct.pack("!HH", port, port)
    for header in (
        text(f"TCP{source.version} {source} {source} {port} {port}"),
        binary(0x11 if source.version == 4 else 0x21, packed),
    ):
        assert parse(header + more) == Header(len(header), plain)


TRUSTED = Networks(["10.0.0.0/8", "192.0.2.1", "2001:db8::/32"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.1.2.3", "203.0.113.9", "203.0.113.9"),
        ("10.1.2.3", "1.1.1.1, 203.0.113.9", "203.0.113.9"),
        ("10.1.2.3", "1.1.1.1, 203.0.113.9, 10.9.9.9,192.0.2.1", "203.0.113.9"),
        ("::ffff:10.1.2.3", "203.0.113.9", "203.0.113.9"),
        ("2001:db8::5", "2001:DB9::1", "2001:db9::1"),
        ("10.1.2.3", "203.0.113.9:1234", "203.0.113.9"),
        ("10.1.2.3", "[2001:db9::1]:1234", "2001:db9::1"),
        ("10.1.2.3", "::ffff:203.0.113.9", "203.0.113.9"),
        ("10.1.2.3", "10.4.4.4, 10.5.5.5", "10.4.4.4"),
        ("10.1.2.3", "203.0.113.9, unknown, 10.5.5.5", "10.5.5.5"),
        ("10.1.2.3", "203.0.113.9, evil\x1b[2J", "10.1.2.3"),
        ("10.1.2.3", "", "10.1.2.3"),
        ("10.1.2.3", ",,,", "10.1.2.3"),
        ("203.0.113.5", "1.2.3.4", "203.0.113.5"),
        ("203.0.113.5", "10.0.0.1", "203.0.113.5"),
        ("unknown", "1.2.3.4", "unknown"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_proxy_of_ours(
    peer: str, forwarded: str, client: str
) -> None:
    assert TRUSTED.client(peer, forwarded) == client


@given(st.text())
def test_whatever_a_proxy_forwards_is_an_address_or_the_proxy(forwarded: str) -> None:
    client = TRUSTED.client("10.1.2.3", forwarded)
    assert ip_address(client)
