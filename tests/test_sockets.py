"""Connections are accepted wherever a listener stands, and none is reset when it closes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import certificates
from tests.conftest import Accounts, eventually, running_gateway
from wsgateway import sockets
from wsgateway.errors import StartError
from wsgateway.sockets import Acceptor

WAITING = 200
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


def connected(port: int, *data: bytes) -> socket.socket:
    """A connection that the kernel has completed, with what was sent on it; nobody accepted it."""
    made = socket.create_connection(("127.0.0.1", port))
    for part in data:
        made.sendall(part)
    made.setblocking(False)
    return made


async def answer(made: socket.socket, context: ssl.SSLContext | None = None) -> bytes:
    """All that is said on a connection."""
    reader, writer = await asyncio.open_connection(
        sock=made, ssl=context, server_hostname="127.0.0.1" if context else None
    )
    with contextlib.closing(writer):
        if context:
            writer.write(HEALTH)
        return await reader.read()


async def test_who_waits_to_be_accepted_when_the_gateway_stops_is_answered(
    accounts: Accounts,
) -> None:
    async with running_gateway(accounts) as gateway:
        waiting = [connected(gateway.port, HEALTH) for _ in range(WAITING)]
        gateway.stop.set()
        answers = await asyncio.gather(*map(answer, waiting))
        assert [each[:15] for each in answers] == [b"HTTP/1.1 200 OK"] * WAITING
        await gateway.task
        with pytest.raises(ConnectionRefusedError):
            connected(gateway.port)


async def test_who_waits_is_answered_also_where_the_port_is_shared(accounts: Accounts) -> None:
    options = {"server__reuse_port": True, "api__enabled": False}
    async with (
        running_gateway(accounts, **options) as first,
        running_gateway(
            accounts, **options, server__port=first.port, server__instance="there"
        ) as second,
    ):
        waiting = [connected(first.port, HEALTH) for _ in range(WAITING)]
        second.stop.set()
        answers = await asyncio.gather(*map(answer, waiting))
        assert [each[:15] for each in answers] == [b"HTTP/1.1 200 OK"] * WAITING
        taken = second.running.instance.metrics.accepted
        assert 0 < taken < WAITING
        assert first.running.instance.metrics.accepted == WAITING - taken


async def test_who_waits_with_a_proxy_header_is_answered(accounts: Accounts) -> None:
    options = {"server__proxy_protocol": True, "server__trusted_proxies": "127.0.0.1"}
    async with running_gateway(accounts, **options) as gateway:
        header = b"PROXY TCP4 192.0.2.7 192.0.2.1 1 2\r\n"
        waiting = [connected(gateway.port, header + HEALTH) for _ in range(WAITING)]
        gateway.stop.set()
        answers = await asyncio.gather(*map(answer, waiting))
        assert [each[:15] for each in answers] == [b"HTTP/1.1 200 OK"] * WAITING


async def test_who_waits_for_a_tls_handshake_is_answered(
    accounts: Accounts, tmp_path: Path
) -> None:
    pair = certificates.make(tmp_path)
    async with running_gateway(accounts, **pair.settings) as gateway:
        context = pair.client()
        waiting = [connected(gateway.port) for _ in range(50)]
        gateway.stop.set()
        answers = await asyncio.gather(*(answer(each, context) for each in waiting))
        assert [each[:15] for each in answers] == [b"HTTP/1.1 200 OK"] * 50


async def test_an_api_call_that_waits_when_the_gateway_stops_is_answered(
    accounts: Accounts,
) -> None:
    async with running_gateway(accounts) as gateway:
        assert gateway.running.api_address is not None
        port = gateway.running.api_address[1]
        close = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        waiting = [connected(port, close) for _ in range(20)]
        gateway.stop.set()
        answers = await asyncio.gather(*map(answer, waiting))
        assert [each[:15] for each in answers] == [b"HTTP/1.1 200 OK"] * 20


async def test_a_preamble_that_never_ends_delays_neither_the_stop_nor_others(
    accounts: Accounts, tmp_path: Path
) -> None:
    pair = certificates.make(tmp_path)
    options = {**pair.settings, "limits__handshake_timeout": 60, "drain__window": 1}
    async with running_gateway(accounts, **options) as gateway:
        silent = connected(gateway.port)
        assert (await answer(connected(gateway.port), pair.client())).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(5):
            await gateway.shut_down()
        silent.close()


async def test_more_preambles_than_there_is_room_for_wait_in_the_kernel(
    accounts: Accounts, tmp_path: Path
) -> None:
    pair = certificates.make(tmp_path)
    options = {**pair.settings, "limits__handshakes": 3, "limits__handshake_timeout": 1,
               "limits__handshake_wait": 0.1}  # fmt: skip
    async with running_gateway(accounts, **options) as gateway:
        silent = [connected(gateway.port) for _ in range(3)]
        late = await asyncio.gather(
            *(answer(connected(gateway.port), pair.client()) for _ in range(10))
        )
        assert [each[:15] for each in late] == [b"HTTP/1.1 200 OK"] * 10
        assert gateway.running.instance.metrics.refused["handshake_timeout"] == 3
        for each in silent:
            each.close()


async def test_connections_beyond_the_descriptors_are_closed_before_their_tls_handshake(
    accounts: Accounts, tmp_path: Path
) -> None:
    pair = certificates.make(tmp_path)
    options = {**pair.settings, "limits__connections": 2, "limits__descriptor_reserve": 2}
    async with running_gateway(accounts, **options) as gateway:
        refused = gateway.running.instance.metrics.refused
        silent = [connected(gateway.port) for _ in range(8)]
        await eventually(lambda: refused["descriptors"] == 5)
        for each in silent:
            each.close()
        await eventually(lambda: refused["tls"] == 3)
        assert (await answer(connected(gateway.port), pair.client())).startswith(b"HTTP/1.1 200")


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def echoed(family: int, address: Any) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(family) as client:
        client.setblocking(False)
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, b"hello")
        return await loop.sock_recv(client, 10)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "", "0.0.0.0", "::"])
async def test_every_address_of_a_host_is_listened_on(host: str) -> None:
    acceptor = Acceptor(await sockets.listen(host, 0, 10, "mend it"), Echo)
    await acceptor.start(10)
    for address in acceptor.addresses:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        assert await echoed(family, address) == b"hello"
    await acceptor.stop()
    await acceptor.close()


async def test_one_port_serves_both_versions_of_the_internet_protocol() -> None:
    first = Acceptor(await sockets.listen("0.0.0.0", 0, 10, "mend it"), Echo)
    second = Acceptor(await sockets.listen("::", first.addresses[0][1], 10, "mend it"), Echo)
    await first.start(10)
    await second.start(10)
    await first.close()
    await second.close()


async def test_a_socket_that_was_passed_in_is_accepted_on() -> None:
    passed = socket.create_server(("127.0.0.1", 0))
    address = passed.getsockname()
    made = connected(address[1], b"hello")  # before anybody accepts
    acceptor = Acceptor(
        await sockets.listen("nowhere.invalid", 1, 10, "mend it", passed=passed), Echo
    )
    await acceptor.start(10)
    assert acceptor.addresses == [address]
    assert await asyncio.get_running_loop().sock_recv(made, 10) == b"hello"
    made.close()
    await acceptor.stop()
    with pytest.raises(ConnectionRefusedError):
        connected(address[1])


async def test_who_waits_at_a_socket_that_stays_open_elsewhere_is_left_to_the_next() -> None:
    kept = socket.create_server(("127.0.0.1", 0))
    passed = await sockets.listen("", 0, 10, "mend it", passed=kept.dup())
    acceptor = Acceptor(passed, Echo, shared=True)
    await acceptor.start(10)
    assert await echoed(socket.AF_INET, kept.getsockname()) == b"hello"
    waiting = connected(kept.getsockname()[1], b"hello")
    await acceptor.stop()  # before the loop could accept
    kept.setblocking(False)
    accepted, _ = kept.accept()
    assert accepted.recv(10) == b"hello"
    for each in (accepted, waiting, kept):
        each.close()


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("127.0.0.1", lambda taken: taken, "the port is in use"),
        ("no-such-host.invalid", lambda _: 0, "no such host"),
        ("x" * 64, lambda _: 0, "no such host"),
        ("192.0.2.1", lambda _: 0, "Cannot assign requested address"),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_told_in_one_line(
    host: str, port: Callable[[int], int], why: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = port(other.getsockname()[1])
        with pytest.raises(StartError) as told:
            await sockets.listen(host, number, 10, "mend it")
    assert str(told.value) == f"cannot listen on {host}:{number}: {why}: mend it"
