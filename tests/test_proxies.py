"""Real nginx and HAProxy before a real gateway, configured as the documentation says."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests import certificates
from tests.certificates import Pair
from tests.conftest import Accounts, Instance, ask, eventually, running_gateway
from wsgateway.config import Keepalive

pytestmark = pytest.mark.proxies

PAGE = (Path(__file__).parent.parent / "docs" / "proxies.md").read_text()
DEVICE = "127.0.0.9"
"""Where the tests' devices connect from: not where the proxies do."""


def snippet(title: str) -> str:
    """The configuration under a heading of the page."""
    found = re.search(rf"## {title}\n.*?```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, title
    return found[1]


def adapted(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


class ProxyServer:
    """A proxy that runs as a process of its own; all that it writes ends in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Start it; returns once it listens."""
        with (self.folder / "output.log").open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        while self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                continue
            return
        raise AssertionError(self.logs())

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[ProxyServer]:
    folder = tmp_path / "proxy"
    folder.mkdir()
    server = ProxyServer(folder)
    yield server
    server.stop()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return certificates.make(tmp_path)


def start_nginx(proxy: ProxyServer, pair: Pair, gateway_port: int) -> None:
    server = adapted(
        snippet("nginx: TLS ends there"),
        {
            "listen 443": f"listen 127.0.0.1:{proxy.port}",
            "127.0.0.1:8000": f"127.0.0.1:{gateway_port}",
            "/etc/ssl/wsgateway.crt": str(pair.certificate),
            "/etc/ssl/wsgateway.key": str(pair.key),
            "/var/log/nginx": str(proxy.folder),
        },
    )
    temporary = "".join(
        f"{name}_temp_path {proxy.folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = proxy.folder / "nginx.conf"
    path.write_text(
        f"daemon off;\npid {proxy.folder}/nginx.pid;\nerror_log {proxy.folder}/main.log;\n"
        f"events {{}}\nhttp {{\n{temporary}{server}}}\n"
    )
    proxy.start("nginx", "-p", str(proxy.folder), "-c", str(path))


def start_haproxy(proxy: ProxyServer, pair: Pair, gateway_port: int, title: str) -> None:
    both = proxy.folder / "both.pem"
    both.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    replacements = {
        "bind :443": f"bind 127.0.0.1:{proxy.port}",
        "127.0.0.1:8000": f"127.0.0.1:{gateway_port}",
        "inter 2s": "inter 100ms",
    }
    text = snippet(title)
    if "/etc/ssl" in text:
        replacements["/etc/ssl/wsgateway.pem"] = str(both)
    path = proxy.folder / "haproxy.cfg"
    path.write_text(adapted(text, replacements))
    proxy.start("haproxy", "-db", "-f", str(path))


def start_haproxy_with_tls(proxy: ProxyServer, pair: Pair, gateway_port: int) -> None:
    start_haproxy(proxy, pair, gateway_port, "HAProxy: TLS ends there")


def start_haproxy_passing(proxy: ProxyServer, pair: Pair, gateway_port: int) -> None:
    start_haproxy(proxy, pair, gateway_port, "HAProxy: TLS ends in the gateway")


KINDS: dict[str, tuple[Callable[[ProxyServer, Pair, int], None], bool]] = {
    "nginx": (start_nginx, False),
    "haproxy": (start_haproxy_with_tls, False),
    "haproxy passing TLS": (start_haproxy_passing, True),
}
"""How each is started, and whether TLS ends in the gateway."""


def options(pair: Pair, passing: bool) -> dict[str, Any]:
    """The gateway's configuration as the page says, with quick pings."""
    quick = {"server__trusted_proxies": "127.0.0.1", "keepalive__interval": 0.2}
    if not passing:
        return quick
    return {**quick, **pair.settings, "api__tls": False, "server__proxy_protocol": True}


def through(proxy: ProxyServer, pair: Pair, target: str, **more: str) -> connect:
    return connect(
        f"wss://127.0.0.1:{proxy.port}{target}", ssl=pair.client(), compression=None,
        local_addr=(DEVICE, 0), additional_headers=more,
    )  # fmt: skip


async def hold(gateway: Instance, device: ClientConnection) -> None:
    """Talk to a device, and keep it silent for longer than some pings."""
    assert orjson.loads(await device.recv())["type"] == "connection_status"
    assert (await ask(device, {"type": "ping"}))["type"] == "pong"
    metrics = gateway.running.instance.metrics
    heard = metrics.received_bytes
    await eventually(lambda: metrics.received_bytes >= heard + 5 * 6)  # five pongs
    assert (await ask(device, {"type": "ping"}))["type"] == "pong"


@pytest.mark.parametrize("kind", KINDS)
async def test_devices_come_through_with_their_address_and_their_token_stays_secret(
    kind: str, proxy: ProxyServer, pair: Pair, accounts: Accounts
) -> None:
    start, passing = KINDS[kind]
    secret = gateway_token = accounts.token
    async with running_gateway(accounts, **options(pair, passing)) as gateway:
        start(proxy, pair, gateway.port)
        roster = gateway.running.instance.roster
        forged = {"X-Forwarded-For": "203.0.113.66"}
        for target, headers in (
            (f"/ws/device/?token={gateway_token}", forged),
            (f"/ws/device/token/{gateway_token}", {}),
            ("/ws/device", {"Authorization": f"Token {gateway_token}", **forged}),
        ):
            async with through(proxy, pair, target, **headers) as device:
                await hold(gateway, device)
                (seen,) = roster.page(roster.find(), "", 10)
                assert seen["address"] == DEVICE
        for target in (f"/ws/device?token={secret}x", f"/ws/device/token/{secret}x"):
            with pytest.raises(InvalidStatus) as refused:
                async with through(proxy, pair, target):
                    pass
            assert refused.value.response.status_code == 403
        assert gateway.running.instance.metrics.refused["proxy_stranger"] == 0
    for target in (f"/ws/device?token={secret}", f"/ws/device/token/{secret}"):
        with pytest.raises((InvalidStatus, OSError, EOFError, ssl.SSLError)):  # nobody is behind it
            async with through(proxy, pair, target):
                pass
    proxy.stop()
    logs = proxy.logs()
    assert DEVICE in logs
    assert passing or "/ws/device" in logs
    assert secret not in logs


@pytest.mark.parametrize("kind", KINDS)
async def test_addresses_are_counted_each_for_itself(
    kind: str, proxy: ProxyServer, pair: Pair, accounts: Accounts
) -> None:
    start, passing = KINDS[kind]
    limits = {"limits__connections_per_ip": 1}
    async with running_gateway(accounts, **options(pair, passing), **limits) as gateway:
        start(proxy, pair, gateway.port)
        target = f"/ws/device?token={gateway.token}"
        url = f"wss://127.0.0.1:{proxy.port}{target}"
        async with through(proxy, pair, target) as device:
            await device.recv()
            with pytest.raises(InvalidStatus) as refused:
                async with through(proxy, pair, target):
                    pass
            assert refused.value.response.status_code == 503
            async with connect(url, ssl=pair.client(), local_addr=("127.0.0.8", 0)) as other:
                await other.recv()


@pytest.mark.parametrize(
    "title",
    ["nginx: TLS ends there", "HAProxy: TLS ends there", "HAProxy: TLS ends in the gateway"],
)
def test_idle_time_outs_are_longer_than_the_pings(title: str) -> None:
    text = snippet(title)
    patterns = r"proxy_(?:read|send)_timeout\s+(\d+)s|timeout (?:client|server|tunnel) (\d+)s"
    found = [int(one or other) for one, other in re.findall(patterns, text)]
    assert len(found) >= 2
    assert min(found) > Keepalive().interval + Keepalive().timeout
