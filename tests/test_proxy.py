"""What proxies tell of their clients, and whom that is believed from."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.asyncio.client import connect

from tests import certificates
from tests.conftest import Accounts, Instance, eventually, running_gateway, settings
from wsgateway.errors import ConfigError
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


PROXIED: dict[str, Any] = {
    "server__proxy_protocol": True,
    "server__trusted_proxies": "127.0.0.1",
    "api__proxy_protocol": True,
}
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def seen(gateway: Instance) -> list[str]:
    """The addresses of the devices, as the API shows them."""
    roster = gateway.running.instance.roster
    return [each["address"] for each in roster.page(roster.find(), "", 100)]


async def asked(port: int, *parts: bytes, source: str = "127.0.0.1") -> bytes:
    """Everything that a listener says to bytes that come in parts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("kind", GOOD)
async def test_a_device_has_the_address_that_the_header_tells(
    kind: str, tls: bool, accounts: Accounts, tmp_path: Path
) -> None:
    header, address = GOOD[kind]
    pair = certificates.make(tmp_path)
    shown = pair.settings if tls else {}
    async with running_gateway(accounts, **PROXIED, **shown) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
            raw.sendall(header)  # which the client's first bytes will follow in the same queue
            async with connect(
                gateway.url().replace("ws:", "wss:" if tls else "ws:"),
                sock=raw, ssl=pair.client() if tls else None, compression=None,
            ) as device:  # fmt: skip
                await device.recv()
                assert seen(gateway) == [address or "127.0.0.1"]


@pytest.mark.parametrize("listener", ["device", "api"])
async def test_a_header_may_come_in_pieces_and_share_one_with_the_request(
    listener: str, accounts: Accounts
) -> None:
    async with running_gateway(accounts, **PROXIED) as gateway:
        assert gateway.running.api_address is not None
        port = gateway.port if listener == "device" else gateway.running.api_address[1]
        for header, _ in (GOOD["tcp4"], GOOD["inet6 with extensions"]):
            whole = header + HEALTH
            single = [bytes([byte]) for byte in whole]
            for parts in ([whole], single, [header[:9], whole[9:]], [whole[:-9], whole[-9:]]):
                assert b" 200 OK\r\n" in await asked(port, *parts)


async def test_a_header_and_a_hello_of_tls_may_share_a_segment(
    accounts: Accounts, tmp_path: Path
) -> None:
    pair = certificates.make(tmp_path)
    async with running_gateway(accounts, **PROXIED, **pair.settings) as gateway:
        for port in (gateway.port, gateway.running.api_address[1]):  # type: ignore[index]
            received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = pair.client().wrap_bio(received, sent, server_hostname="127.0.0.1")
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GOOD["inet"][0] + sent.read())
            while True:
                received.write(await reader.read(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                    break
            client.write(HEALTH)
            writer.write(sent.read())
            answer = b""
            while b"200 OK" not in answer:
                received.write(await reader.read(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += client.read(65536)
            writer.close()


@pytest.mark.parametrize("listener", ["device", "api"])
async def test_strangers_are_closed_whatever_header_they_forge(
    listener: str, accounts: Accounts, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_gateway(accounts, **PROXIED) as gateway:
        assert gateway.running.api_address is not None
        port = gateway.port if listener == "device" else gateway.running.api_address[1]
        for data in (GOOD["tcp4"][0] + HEALTH, HEALTH, b""):
            assert await asked(port, data, source="127.0.0.9") == b""
        assert gateway.running.instance.metrics.refused["proxy_stranger"] == 3
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert lines == ["connection refused reason=proxy_stranger address=127.0.0.9"] * 3


@pytest.mark.parametrize(
    "data",
    [HEALTH, GOOD["tcp4"][0][:9], SIGNATURE, b"PROXY " + b"x" * 5000, b"\x16\x03\x01\x02" * 99],
)
async def test_a_trusted_proxy_that_sends_no_header_is_closed(
    data: bytes, accounts: Accounts
) -> None:
    async with running_gateway(accounts, **PROXIED) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(data)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert gateway.running.instance.metrics.refused["proxy_header"] == 1


async def test_a_header_that_does_not_end_counts_in_the_handshakes_time(
    accounts: Accounts,
) -> None:
    quick = {"limits__handshake_timeout": 0.5, "limits__handshake_wait": 0.1}
    async with running_gateway(accounts, **PROXIED, **quick) as gateway:
        nothing = asked(gateway.port)
        half = asked(gateway.port, GOOD["inet"][0][:20])
        no_request = asked(gateway.port, GOOD["inet"][0])
        async with asyncio.timeout(5):
            assert await asyncio.gather(nothing, half, no_request) == [b""] * 3
        assert gateway.running.instance.metrics.refused["handshake_timeout"] == 3


async def test_connections_are_counted_by_the_address_in_the_header(accounts: Accounts) -> None:
    async with running_gateway(accounts, **PROXIED, limits__connections_per_ip=1) as gateway:

        @contextlib.asynccontextmanager
        async def device(last: int) -> Any:
            with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
                raw.sendall(text(f"TCP4 192.0.2.{last} 192.0.2.1 1 2"))
                async with connect(gateway.url(), sock=raw, compression=None) as made:
                    yield await made.recv()

        async with device(7), device(8):
            assert sorted(seen(gateway)) == ["192.0.2.7", "192.0.2.8"]
            with pytest.raises(Exception, match="503"):
                async with device(8):
                    pass
        await eventually(lambda: not seen(gateway))
        async with device(8):
            pass


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["10.0.0.1, 203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, 127.0.0.1"], "203.0.113.9"),
        (["2001:db8::7"], "2001:db8::7"),
        (["nonsense"], "127.0.0.1"),
        ([], "127.0.0.1"),
    ],
)
async def test_a_trusted_proxy_says_who_the_device_is_in_a_header_of_http(
    forwarded: list[str], address: str, accounts: Accounts
) -> None:
    headers = [("x-Forwarded-For", each) for each in forwarded]
    async with running_gateway(accounts, server__trusted_proxies="127.0.0.0/29") as gateway:
        async with gateway.device(additional_headers=headers):
            assert seen(gateway) == [address]
        stranger = {"additional_headers": headers, "local_addr": ("127.0.0.9", 0)}
        async with gateway.device(**stranger):
            assert seen(gateway) == ["127.0.0.9"]


async def test_what_forwards_is_believed_by_nobody_unless_configured(gateway: Instance) -> None:
    async with gateway.device(additional_headers={"X-Forwarded-For": "203.0.113.9"}):
        assert seen(gateway) == ["127.0.0.1"]


async def test_connections_are_counted_by_the_address_that_a_proxy_forwards(
    accounts: Accounts,
) -> None:
    options = {"server__trusted_proxies": "127.0.0.1", "limits__connections_per_ip": 1}
    async with running_gateway(accounts, **options) as gateway:

        def device(last: int) -> Any:
            return gateway.device(additional_headers={"X-Forwarded-For": f"192.0.2.{last}"})

        async with device(7), device(8):
            with pytest.raises(Exception, match="503"):
                async with device(8):
                    pass
        await eventually(lambda: gateway.running.instance.listener.connections == 0)
        async with device(8):
            pass


async def test_callers_of_the_api_are_named_by_trusted_proxies_only(
    accounts: Accounts, caplog: pytest.LogCaptureFixture
) -> None:
    call = (
        b"GET /api/queue HTTP/1.1\r\nHost: h\r\nX-API-Key: wrong\r\n"
        b"X-Forwarded-For: 1.1.1.1, 203.0.113.9\r\nConnection: close\r\n\r\n"
    )
    async with running_gateway(accounts, server__trusted_proxies="127.0.0.1") as gateway:
        assert gateway.running.api_address is not None
        port = gateway.running.api_address[1]
        assert b" 401 " in await asked(port, call)
        assert b" 401 " in await asked(port, call, source="127.0.0.9")
    async with running_gateway(accounts, **PROXIED) as gateway:
        assert gateway.running.api_address is not None
        port = gateway.running.api_address[1]
        assert b" 401 " in await asked(port, GOOD["inet6"][0] + call)
        assert b" 400 " in await asked(port, GOOD["inet"][0] + b"\x00nonsense\r\n\r\n")
    found = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert [line.rpartition("=")[2] for line in found] == [
        "203.0.113.9", "127.0.0.9", "2001:db8::7", "192.0.2.7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"server__trusted_proxies": "10.0.0.0/8,10.0.0.1/8"}, "'10.0.0.1/8' is neither"),
        ({"server__trusted_proxies": "proxy.example"}, "'proxy.example' is neither"),
        ({"server__proxy_protocol": True}, "server.proxy_protocol = true: needs server.trusted"),
        ({"api__proxy_protocol": True}, "api.proxy_protocol = true: needs server.trusted"),
        ({"server__tls": True}, "server.tls = true: needs tls.certificate"),
        ({"api__tls": True}, "api.tls = true: needs tls.certificate"),
        ({"tls__minimum_version": "1.1"}, "tls.minimum_version = '1.1': must be one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    overrides: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        settings(Accounts(tmp_path), **overrides)
    assert sentence in str(told.value)
