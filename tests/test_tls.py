"""TLS on both listeners: what is shown, what is refused, and what is wrong with a certificate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests import certificates
from tests.certificates import Pair
from tests.conftest import (
    Accounts,
    Instance,
    Process,
    ask,
    eventually,
    running_gateway,
    settings,
)  # fmt: skip
from wsgateway import tls
from wsgateway.errors import ConfigError
from wsgateway.metrics import Metrics
from wsgateway.tls import Tls

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return certificates.make(tmp_path)


def device(gateway: Instance, pair: Pair, token: str | None = None) -> connect:
    url = gateway.url(token).replace("ws://", "wss://")
    return connect(url, ssl=pair.client(), compression=None)


async def status(connection: ClientConnection) -> str:
    return str(orjson.loads(await connection.recv())["type"])


async def asked(port: int, data: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Everything that a listener says to some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(data)
    try:
        return await reader.read()
    except (ConnectionError, ssl.SSLError):
        return b"reset"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def test_a_device_and_a_backend_meet_over_tls(accounts: Accounts, pair: Pair) -> None:
    key = await accounts.add_token(scope="api")
    async with running_gateway(accounts, **pair.settings) as gateway:
        assert gateway.running.api_address is not None
        async with device(gateway, pair) as one:
            assert await status(one) == "connection_status"
            assert (await ask(one, {"type": "ping"}))["type"] == "pong"
            body = orjson.dumps({"type": "news", "message": "x" * 50_000, "user_id": 1})
            request = (
                f"POST /api/messages HTTP/1.1\r\nHost: h\r\nX-API-Key: {key}\r\n"
                "Connection: close\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode()
            said = await asked(gateway.running.api_address[1], request + body, pair.client())
            assert said.startswith(b"HTTP/1.1 200 OK")
            assert orjson.loads(await one.recv())["message"] == "x" * 50_000
            gateway.stop.set()
            with pytest.raises(ConnectionClosed):
                await one.recv()
            assert one.close_code == 1012


async def test_a_refused_device_reads_why_also_when_it_has_said_more(
    accounts: Accounts, pair: Pair
) -> None:
    request = (
        b"GET /ws/device?token=wrong HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    )
    async with running_gateway(accounts, **pair.settings) as gateway:
        for more in (b"", b"\x81\x80abcd" * 1000):
            said = await asked(gateway.port, request + more, pair.client())
            assert said.startswith(b"HTTP/1.1 403 Forbidden")
            assert said.endswith(b'{"error":"unauthorized"}')


async def test_a_device_that_ends_its_side_while_it_is_decided_about_leaves_nothing(
    accounts: Accounts, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_gateway(accounts, **pair.settings) as gateway:
        listener = gateway.running.instance.listener
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, ssl=pair.client())
        writer.write(
            f"GET /ws/device?token={gateway.token} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        writer.close()
        await eventually(lambda: listener.connections == 0)
    assert "eof_received" not in caplog.text


async def test_a_reader_that_stalls_is_cut_and_holds_no_more_than_it_may(
    accounts: Accounts, pair: Pair
) -> None:
    options = {**pair.settings, "limits__outbound_bytes": 65536, "limits__outbound_stall": 1}
    async with running_gateway(accounts, **options) as gateway:
        metrics, listener = gateway.running.instance.metrics, gateway.running.instance.listener
        async with device(gateway, pair) as one:
            await status(one)
            one.transport.pause_reading()
            sent = 0
            while listener.connections and sent < 2000:
                gateway.running.instance.gateway.to_user(
                    1, {"type": "news", "message": "x" * 30_000}
                )
                sent += 1
                await asyncio.sleep(0)
            await eventually(lambda: listener.connections == 0)
            one.transport.abort()
        assert metrics.aborted["slow"] + metrics.aborted["stalled"] == 1


async def test_peers_that_ignore_the_close_of_tls_are_cut_in_time(
    accounts: Accounts, pair: Pair
) -> None:
    options = {**pair.settings, "keepalive__close_timeout": 1, "drain__window": 1}
    async with running_gateway(accounts, **options) as gateway, device(gateway, pair) as one:
        await status(one)
        one.transport.pause_reading()
        async with asyncio.timeout(5):
            await gateway.shut_down()
        one.transport.abort()


@pytest.mark.parametrize("listener", ["device", "api"])
@pytest.mark.parametrize(
    "data",
    [
        b"GET /ws/device HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 600,
        b"\x16\x03\x01\x40\x00" + b"\x00" * 16384,
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x00" * 4096,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
    ids=["http", "bad hello", "long record", "alert", "zeros", "ssh", "nothing"],
)
async def test_what_is_no_tls_is_closed_counted_and_told_in_a_line(
    accounts: Accounts, pair: Pair, data: bytes, listener: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_gateway(accounts, **pair.settings) as gateway:
        refused = gateway.running.instance.metrics.refused
        assert gateway.running.api_address is not None
        port = gateway.port if listener == "device" else gateway.running.api_address[1]
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            writer.write_eof()
            await reader.read()
            writer.close()
        await eventually(lambda: refused["tls"] == 1)
        async with device(gateway, pair) as one:
            assert await status(one) == "connection_status"
    lines = [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]
    assert [each.getMessage()[:39] for each in lines] == ["tls handshake failed address=127.0.0.1:"]
    assert lines[0].exc_info is None


async def test_a_tls_handshake_that_is_too_slow_counts_in_the_handshakes_time(
    accounts: Accounts, pair: Pair
) -> None:
    async with running_gateway(
        accounts, **pair.settings, limits__handshake_timeout=0.5, limits__handshake_wait=0.1
    ) as gateway:
        refused = gateway.running.instance.metrics.refused
        loop = asyncio.get_running_loop()
        started = loop.time()
        silent = await asyncio.open_connection("127.0.0.1", gateway.port)
        half = await asyncio.open_connection("127.0.0.1", gateway.port)
        half[1].write(b"\x16\x03\x01\x02\x00\x01\x00")
        no_request = await asyncio.open_connection("127.0.0.1", gateway.port, ssl=pair.client())
        for reader, writer in (silent, half, no_request):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        assert 0.4 < loop.time() - started < 5
        assert refused["handshake_timeout"] == 3


async def test_only_versions_from_the_configured_one_on_are_spoken(
    accounts: Accounts, pair: Pair
) -> None:
    async def speaks(gateway: Instance, version: ssl.TLSVersion) -> bool:
        context = pair.client()
        context.minimum_version = context.maximum_version = version
        try:
            return b" 200 OK" in await asked(gateway.port, HEALTH, context)
        except (ssl.SSLError, ConnectionError):
            return False

    old, new = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
    async with running_gateway(accounts, **pair.settings) as gateway:
        assert [await speaks(gateway, version) for version in (old, new)] == [True, True]
        await gateway.reload(tls__minimum_version="1.3")
        assert [await speaks(gateway, version) for version in (old, new)] == [False, True]


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_stay(
    accounts: Accounts, pair: Pair, tmp_path: Path
) -> None:
    other = certificates.make(tmp_path, "other", days=60)
    async with running_gateway(accounts, **pair.settings) as gateway:
        instance = gateway.running.instance
        assert instance.tls is not None
        assert instance.metrics.tls_certificate_expires == pair.expires.timestamp()
        async with device(gateway, pair) as old:
            await status(old)
            pair.certificate.write_bytes(other.certificate.read_bytes())
            with pytest.raises(ConfigError, match="is not the key of"):
                await gateway.reload()
            with pytest.raises(ConfigError, match="cannot be read"):
                await gateway.reload(tls__key="gone.key")
            assert instance.tls.expires_at == pair.expires.timestamp()
            with pytest.raises(ssl.SSLCertVerificationError):
                await asked(gateway.port, HEALTH, other.client())
            pair.key.write_bytes(other.key.read_bytes())
            await gateway.reload(tls__key=str(pair.key))
            assert b" 200 OK" in await asked(gateway.port, HEALTH, other.client())
            assert (await ask(old, {"type": "ping"}))["type"] == "pong"
            assert instance.metrics.tls_certificate_expires == other.expires.timestamp()


def broken(tmp_path: Path) -> dict[str, tuple[dict[str, object], str]]:
    """Configurations that cannot be used, with what is said about them."""
    good, other = certificates.make(tmp_path, "good"), certificates.make(tmp_path, "other")
    sealed = certificates.make(tmp_path, "sealed", password=b"secret")
    noise = tmp_path / "noise.crt"
    noise.write_bytes(os.urandom(3000))
    cut = tmp_path / "cut.crt"
    text = good.certificate.read_text()
    cut.write_text(text[:200] + "\n-----END CERTIFICATE-----\n")
    return {
        "missing": ({"tls__certificate": "gone.crt"}, "tls.certificate = gone.crt: cannot be read: No"),
        "folder": ({"tls__certificate": str(tmp_path)}, "cannot be read: Is a directory"),
        "noise": ({"tls__certificate": str(noise)}, "holds no certificate in PEM"),
        "key as certificate": ({"tls__certificate": str(good.key)}, "holds no certificate in PEM"),
        "no key": (
            {"tls__certificate": str(good.certificate), "tls__key": ""},
            "holds no private key in PEM",
        ),
        "cut": ({"tls__certificate": str(cut), "tls__key": str(good.key)}, "cut.crt, tls.key = "),
        "other's key": (
            {"tls__certificate": str(good.certificate), "tls__key": str(other.key)},
            "is not the key of",
        ),
        "passphrase": (
            {"tls__certificate": str(sealed.certificate), "tls__key": str(sealed.key)},
            "is encrypted: write it without a passphrase",
        ),
        "no credentials": ({"tls__certificate": "credential:cert"}, "needs systemd's"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    ["missing", "folder", "noise", "key as certificate", "no key", "cut", "other's key",
     "passphrase", "no credentials"],
)  # fmt: skip
def test_a_certificate_that_cannot_be_used_is_one_line(case: str, tmp_path: Path) -> None:
    overrides, sentence = broken(tmp_path)[case]
    with pytest.raises(ConfigError) as told:
        Tls(settings(Accounts(tmp_path), **overrides), Metrics())
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_a_certificate_and_its_key_may_share_a_file_and_be_credentials(
    tmp_path: Path, pair: Pair, environment: dict[str, str], cli: Callable[..., Any]
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    arguments = ("--set", "server.tls=true", "--set", "tls.certificate=credential:both.pem")
    done = cli("config", "check", *arguments, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "configuration ok (defaults)\n")


def test_the_check_of_a_configuration_finds_what_is_wrong_with_a_certificate(
    tmp_path: Path, pair: Pair, cli: Callable[..., Any]
) -> None:
    other = certificates.make(tmp_path, "other")
    words = ["--set", f"tls.certificate={pair.certificate}", "--set", f"tls.key={other.key}"]
    for command in (["config", "check"], ["serve"], ["serve", "--check"]):
        done = cli(*command, "--set", "server.tls=true", *words)
        assert done.returncode == 78
        assert (
            done.stderr
            == f"wsgateway: tls.key = {other.key}: is not the key of {pair.certificate}\n"
        )


def test_an_expired_certificate_is_used_with_a_warning(
    tmp_path: Path, serve: Callable[..., Process]
) -> None:
    old = certificates.make(tmp_path, "old", days=-2)
    words = [f"--set=tls.certificate={old.certificate}", f"--set=tls.key={old.key}"]
    process = serve("--set", "server.tls=true", *words, "--demo")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", process.port)) as raw,
        context.wrap_socket(raw) as client,
    ):
        client.sendall(HEALTH)
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert process.stop() == 0
    found = re.findall(r"warning .*expired on (\S+): clients", process.log.read_text())
    assert found == [str(old.expires.date())]


@given(st.integers(-20_000, 2_000_000))
def test_the_end_of_a_certificate_is_read_whatever_its_century(
    tmp_path_factory: pytest.TempPathFactory, days: int
) -> None:
    made = certificates.make(tmp_path_factory.getbasetemp(), "dated", days=days)
    assert tls.expires_at(made.certificate) == made.expires.timestamp()


def test_openssl_says_the_same_about_a_chain(tmp_path: Path, pair: Pair) -> None:
    chain = tmp_path / "chain.pem"
    issuer = certificates.make(tmp_path, "issuer", days=900)
    chain.write_bytes(
        b"Bag Attributes\n" + pair.certificate.read_bytes() + issuer.certificate.read_bytes()
    )
    said = subprocess.run(
        ["openssl", "x509", "-enddate", "-noout", "-in", str(chain)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert tls.expires_at(chain) == ssl.cert_time_to_seconds(said.stdout.strip().partition("=")[2])
