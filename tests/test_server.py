"""The life of the process: what it says when it starts, why it does not, and how it ends.

Each gateway is a process of its own, started as an operator starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.conftest import Process
from wsgateway import __version__, auth, store

Serve = Callable[..., Process]
LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
LOOPBACK = ("--host", "127.0.0.1")


@dataclass
class Tokens:
    """A database with tokens of one user: valid, revoked, expired, of another scope."""

    path: Path
    valid: str
    revoked: str
    expired: str
    scope: str

    @property
    def all(self) -> list[str]:
        return [self.valid, self.revoked, self.expired, self.scope]


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    path = tmp_path / "state" / "wsgateway" / "wsgateway.db"
    made = Tokens(path, *(auth.new_token() for _ in range(4)))

    async def fill() -> None:
        async with store.open_to_write(path, create=True) as db:
            await db.bind(await db.add_user("alice"), await db.add_device("speaker"))
            for token in (made.valid, made.revoked):
                await db.add_token(auth.hash_token(token), 1, "device")
            await db.add_token(auth.hash_token(made.expired), 1, "device", expires_at=1)
            await db.add_token(auth.hash_token(made.scope), 1, "admin")
            await db.revoke("hash", auth.hash_token(made.revoked))

    asyncio.run(fill())
    return made


@pytest.fixture
def refused(
    tmp_path: Path, environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `serve ARGUMENTS...` that is to end by itself; ``shell`` runs before it."""

    def run(*arguments: str, shell: str = "true") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", f'{shell}; exec "$@"', "sh", sys.executable, "-m", "wsgateway", "serve",
             *LOOPBACK, "--port", "0", *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip

    return run


def url(gateway: Process, token: str) -> str:
    return f"ws://127.0.0.1:{gateway.port}/ws/device/?token={token}"


@contextlib.contextmanager
def device(gateway: Process, token: str, **options: Any) -> Iterator[ClientConnection]:
    with connect(url(gateway, token), compression=None, **options) as connection:
        assert json.loads(connection.recv(timeout=10))["type"] == "connection_status"
        yield connection


def ping(connection: ClientConnection) -> str:
    connection.send('{"type": "ping"}')
    answer: str = json.loads(connection.recv(timeout=10))["type"]
    return answer


# The start.


@LOOPS
def test_one_line_says_what_it_runs_on(tokens: Tokens, serve: Serve, loop: str) -> None:
    name = ("--set", "server.instance=north")
    gateway = serve(*LOOPBACK, "--loop", loop, "--set", "limits.connections=77", *name)
    with device(gateway, tokens.valid) as connection:
        assert ping(connection) == "pong"
    lines = [line for line in gateway.log.read_text().splitlines() if " ready " in line]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert len(lines) == 1
    assert re.search(
        rf" info north wsgateway {re.escape(__version__)} ready pid={gateway.popen.pid} "
        rf"instance=north devices=127.0.0.1:{gateway.port} api=127.0.0.1:\d+ redis=off "
        rf"max_connections=77 descriptors={hard} database={tokens.path} loop={loop}$",
        lines[0],
    )
    assert gateway.stop() == 0


def test_the_room_for_connections_is_what_the_descriptors_leave(
    tokens: Tokens, tmp_path: Path, environment: dict[str, str]
) -> None:
    with (tmp_path / "log").open("w+") as log:
        gateway = subprocess.Popen(
            ["sh", "-c", 'ulimit -n 300; exec "$@"', "sh", sys.executable, "-m", "wsgateway",
             "serve", *LOOPBACK, "--port", "0", "--set", "limits.descriptor_reserve=100"],
            stderr=log, env=environment, cwd=tmp_path,
        )  # fmt: skip
        try:
            while " ready " not in (text := (tmp_path / "log").read_text()):
                assert gateway.poll() is None, text
            assert "max_connections=200 descriptors=300 " in text
            gateway.terminate()
            assert gateway.wait(20) == 0
        finally:
            gateway.kill()
            gateway.wait()


def _locked(path: Path) -> sqlite3.Connection:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN EXCLUSIVE")
    return other


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _older(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 0")


def _nothing(_: Path) -> None: ...


START_FAILURES: dict[str, tuple[Callable[[Path], Any], list[str], str, int, str]] = {
    "no database": (_missing, [], "true", 78, "no token database: run wsgateway db init"),
    "no folder of the database": (
        _nothing, ["--database", "no/such.db"], "true", 78, "run wsgateway db init",
    ),
    "an empty database": (_empty, [], "true", 78, "is not a wsgateway database"),
    "an old database": (_older, [], "true", 78, "has an older schema (0): run wsgateway db init"),
    "a locked database": (_locked, [], "true", 3, "is locked by another program: try again"),
    "an unknown key": (
        _nothing, ["--set", "server.prot=1"], "true", 78, "no such key; did you mean server.port?",
    ),
    "a wrong value": (
        _nothing, ["--port", "high"], "true", 78, "server.port = 'high': must be a whole number",
    ),
    "a wrong loop": (
        _nothing, ["--loop", "trio"], "true", 78, "must be one of 'uvloop', 'asyncio'",
    ),
    "an impossible combination": (
        _nothing, ["--set", "limits.outbound_bytes=1"], "true", 78, "must be at least",
    ),
    "a missing file": (_nothing, ["-c", "none.toml"], "true", 78, "no such configuration file"),
    "a missing handler module": (
        _nothing, ["--set", "handlers.modules=no.such"], "true", 78, "no.such",
    ),
    "a broken handler module": (
        _nothing, ["--set", "handlers.modules=tests.broken_handlers"], "true", 78,
        "tests.broken_handlers",
    ),
    "more connections than descriptors": (
        _nothing, ["--set", "limits.connections=1000"], "ulimit -n 512", 78,
        "limits.connections = 1000: only 384 fit under the descriptor limit of 512",
    ),
    "fewer descriptors than the reserve": (
        _nothing, [], "ulimit -n 100", 78, "only 0 fit under the descriptor limit of 100",
    ),
    "no such host": (_nothing, ["--host", "no.such.invalid"], "true", 3, "no such host"),
    "an address of another machine": (
        _nothing, ["--host", "192.0.2.1"], "true", 3, "cannot listen on 192.0.2.1:0",
    ),
    "a wrong flag": (_nothing, ["--prot", "1"], "true", 2, "unrecognized arguments: --prot 1"),
}  # fmt: skip


@pytest.mark.parametrize("failure", START_FAILURES)
def test_what_keeps_it_from_starting_is_one_line_and_an_exit_code(
    tokens: Tokens,
    refused: Callable[..., subprocess.CompletedProcess[str]],
    failure: str,
) -> None:
    breaks, arguments, shell, code, sentence = START_FAILURES[failure]
    holder = breaks(tokens.path)
    done = refused(*arguments, shell=shell)
    if holder is not None:
        holder.close()
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert sentence in done.stderr
    assert done.stdout == ""
    assert tokens.path.exists() == (failure != "no database")


@LOOPS
def test_a_busy_port_is_worth_another_try(
    tokens: Tokens, refused: Callable[..., subprocess.CompletedProcess[str]], loop: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = refused("--port", str(port), "--loop", loop)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"wsgateway: cannot listen on 127.0.0.1:{port}: the port is in use: "
        "stop what uses it, or set server.port\n"
    )


def test_checking_looks_at_the_configuration_and_the_handlers_alone(
    refused: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = refused("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "configuration ok (defaults)\n", "")
    for wrong in ("log.level=loud", "handlers.modules=tests.broken_handlers"):
        done = refused("--check", "--set", wrong)
        assert (done.returncode, done.stdout) == (78, "")
        assert len(done.stderr.splitlines()) == 1


# The end.


PATIENT = [*LOOPBACK]
"""Limits that none of the peers below exceeds."""
for _key, _value in {
    "limits.messages": 100_000,
    "limits.outbound_bytes": "100MiB",
    "limits.outbound_stall": "1h",
    "limits.handshake_timeout": "1h",
    "keepalive.close_timeout": "1h",
}.items():
    PATIENT += ["--set", f"{_key}={_value}"]


class Peers:
    """Peers that do nothing to let a gateway end."""

    def __init__(self, gateway: Process, token: str) -> None:
        self._gateway = gateway
        self.sockets: list[socket.socket] = []
        self._silent()
        self._half_handshaken(token)
        self._deaf(token)
        self._stalled(token)
        self._half_closed(token)

    def close(self) -> None:
        for each in self.sockets:
            each.close()

    def _connect(self) -> socket.socket:
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.settimeout(10)
        peer.connect(("127.0.0.1", self._gateway.port))
        self.sockets.append(peer)
        return peer

    def _silent(self) -> None:
        """Says nothing at all."""
        self._connect()

    def _half_handshaken(self, token: str) -> None:
        """Begins a request and does not end it."""
        self._connect().sendall(request(token)[:-2])

    def _deaf(self, token: str) -> socket.socket:
        """Is connected, reads, and never answers a close frame."""
        peer = self._connect()
        peer.sendall(request(token))
        said = b""
        while b"connection_status" not in said:
            said += peer.recv(4096)
        return peer

    def _half_closed(self, token: str) -> None:
        """Is in a fragmented message that it does not end."""
        self._deaf(token).sendall(b"\x01\x82\0\0\0\0{{")

    def _stalled(self, token: str) -> None:
        """Asks for more than the kernel buffers and reads none of it."""
        peer = self._deaf(token)
        message = json.dumps({"type": "chat_message", "message": "x" * 10_000}).encode()
        frame = b"\x81\xfe" + len(message).to_bytes(2, "big") + bytes(4) + message
        for _ in range(1000):
            peer.sendall(frame)


def request(token: str) -> bytes:
    return (
        f"GET /ws/device/?token={token} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


@LOOPS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_sends_every_device_away_and_ends_it_in_time_whatever_peers_do(
    tokens: Tokens, serve: Serve, loop: str, number: signal.Signals
) -> None:
    window = 1
    gateway = serve(*PATIENT, "--loop", loop, "--set", f"drain.window={window}s")
    peers = Peers(gateway, tokens.valid)
    with contextlib.ExitStack() as stack:
        stack.callback(peers.close)
        devices = [stack.enter_context(device(gateway, tokens.valid)) for _ in range(5)]
        assert [ping(each) for each in devices] == ["pong"] * 5
        began = time.monotonic()
        gateway.popen.send_signal(number)
        for each in devices:
            with pytest.raises(ConnectionClosed) as caught:
                each.recv(timeout=10)
            close = caught.value.rcvd
            assert close is not None
            assert close.code == 1012
            retry = json.loads(close.reason)
            assert list(retry) == ["retry_ms"]
            assert 0 <= retry["retry_ms"] <= window * 1000
        assert gateway.popen.wait(20) == 0
        slack = 1.5  # for the machine
        assert time.monotonic() - began < window + 2 + slack
    said = gateway.log.read_text()
    assert "Traceback" not in said
    assert " draining connections=10 seconds=1\n" in said
    assert " stopped\n" in said
    assert said.count(" device in ") == said.count(" device out ") == 8


@LOOPS
def test_without_devices_it_ends_at_once_and_frees_its_port(
    tokens: Tokens, serve: Serve, loop: str
) -> None:
    gateway = serve(*LOOPBACK, "--loop", loop, "--set", "drain.window=1h")
    assert gateway.stop() == 0
    again = serve(*LOOPBACK, "--loop", loop, "--port", str(gateway.port))
    assert again.port == gateway.port
    assert again.stop() == 0


@LOOPS
def test_while_it_drains_nobody_is_accepted_and_a_second_signal_ends_it_at_once(
    tokens: Tokens, serve: Serve, loop: str
) -> None:
    gateway = serve(*PATIENT, "--loop", loop, "--set", "drain.window=1h")
    peers = Peers(gateway, tokens.valid)
    try:
        with device(gateway, tokens.valid) as last:
            gateway.popen.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                last.recv(timeout=10)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", gateway.port))
        assert gateway.popen.poll() is None
        gateway.popen.send_signal(signal.SIGTERM)
        gateway.popen.wait(10)
    finally:
        peers.close()
    assert "Traceback" not in gateway.log.read_text()
    assert "stopped at once by a second signal" in gateway.log.read_text()
    with contextlib.closing(sqlite3.connect(tokens.path)) as other:
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_killed_gateway_starts_again(tokens: Tokens, serve: Serve) -> None:
    gateway = serve(*LOOPBACK)
    with device(gateway, tokens.valid):
        assert gateway.stop(signal.SIGKILL) == -signal.SIGKILL
    again = serve(*LOOPBACK, "--port", str(gateway.port))
    with device(again, tokens.valid) as connection:
        assert ping(connection) == "pong"
    assert again.stop() == 0


# The demo.


def demo_url(gateway: Process) -> str:
    """The address that a demo tells; ends it."""
    gateway.stop()
    assert gateway.popen.stdout is not None
    found = re.search(r"-m websockets '(ws://127\.0\.0\.1:\d+/ws/device/\?token=[\w-]+)'",
                      gateway.popen.stdout.read())  # fmt: skip
    assert found is not None
    return found[1]


def test_each_demo_tells_the_same_address_and_lets_its_device_in(
    tmp_path: Path, serve: Serve
) -> None:
    state = tmp_path / "state" / "wsgateway"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    first = serve("--demo", "--port", port)
    token = (state / "demo.token").read_text().strip()
    with device(first, token) as connection:
        assert ping(connection) == "pong"
    address = demo_url(first)
    assert address == url(first, token)
    for _ in range(2):
        again = serve("--demo", "--port", port)
        with device(again, token):
            pass
        assert demo_url(again) == address
    for name in ("demo.token", "demo.db"):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert not (state / "wsgateway.db").exists()
    logs = "".join(path.read_text() for path in tmp_path.glob("serve-*.log"))
    assert token not in logs


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        ((), {}),
        ((), {"WSGATEWAY_SERVER_HOST": "0.0.0.0", "WSGATEWAY_AUTH_DATABASE": "other.db"}),
        (("--host", "0.0.0.0", "--database", "other.db"), {}),
    ],
    ids=["as it is", "told otherwise by the environment", "told otherwise on the command line"],
)
def test_a_demo_listens_on_this_machine_and_uses_its_database_alone(
    tmp_path: Path, serve: Serve, arguments: tuple[str, ...], environ: dict[str, str]
) -> None:
    gateway = serve("--demo", *arguments, **environ)
    log = gateway.log.read_text()
    assert f" devices=127.0.0.1:{gateway.port} " in log
    assert f" database={tmp_path / 'state' / 'wsgateway' / 'demo.db'} " in log
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda file: file.write_bytes(b""),
    ],
    ids=["deleted", "emptied"],
)
def test_a_demo_whose_token_was_lost_makes_another(
    tmp_path: Path, serve: Serve, spoil: Callable[[Path], object]
) -> None:
    file = tmp_path / "state" / "wsgateway" / "demo.token"
    serve("--demo").stop()
    old = file.read_text().strip()
    spoil(file)
    gateway = serve("--demo")
    token = file.read_text().strip()
    assert token != old
    with device(gateway, token) as connection:
        assert ping(connection) == "pong"


def _other_program(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
        other.execute("PRAGMA user_version = 1")


def _ours(path: Path) -> None:
    async def make() -> None:
        async with store.open_to_write(path, create=True) as db:
            await db.add_user("alice")

    asyncio.run(make())


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("demo.db", _other_program, 78),
        ("demo.db", _ours, 78),
        ("demo.db", lambda path: path.write_bytes(b"garbage " * 999), 78),
        ("demo.db", lambda path: path.mkdir(), None),
        ("demo.token", lambda path: path.write_bytes(b"\xff\xfe\n"), None),
        ("demo.token", lambda path: path.mkdir(), None),
        ("", lambda path: path.write_text("a file where the folder is to be"), None),
    ],
    ids=[
        "another program's database", "a database of real users", "garbage", "a folder",
        "a token that is no text", "a folder as token", "no folder",
    ],
)  # fmt: skip
def test_a_demo_uses_nothing_that_it_did_not_make(
    tmp_path: Path,
    refused: Callable[..., subprocess.CompletedProcess[str]],
    name: str,
    make: Callable[[Path], object],
    code: int | None,
) -> None:
    state = tmp_path / "state" / "wsgateway"
    state.parent.mkdir()
    if name:
        state.mkdir()
    make(state / name)
    before = (state / name).read_bytes() if (state / name).is_file() else None
    done = refused("--demo")
    assert done.returncode in ((code,) if code else (1, 3, 78)), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("wsgateway: ")
    assert str(state / name).rstrip("/") in done.stderr
    assert (state / name).is_dir() or (state / name).read_bytes() == before


# The log.


def every_way_in(gateway: Process, token: str) -> None:
    """Show a token in each place where a client can put it."""
    base = f"ws://127.0.0.1:{gateway.port}"
    ways: list[tuple[str, dict[str, str], list[Subprotocol] | None]] = [
        (f"/ws/device/?token={token}", {}, None),
        (f"/ws/device/token/{token}", {}, None),
        (f"/ws/device/{token}", {}, None),
        (f"/{token}?token={token}", {}, None),
        ("/ws/device/", {"Authorization": f"Token {token}"}, None),
        ("/ws/device/77", {"Authorization": f"Bearer {token}"}, None),
        ("/ws/device/", {}, [Subprotocol("wsgateway.v1"), Subprotocol(f"token.{token}")]),
    ]
    for path, headers, subprotocols in ways:
        with (
            contextlib.suppress(InvalidStatus, ConnectionClosed),
            connect(base + path, additional_headers=headers, subprotocols=subprotocols) as peer,
        ):
            peer.recv(timeout=10)
            for text in (token, f'{{"type": "{token}"}}', f'{{"type": "ping", "x": "{token}"}}'):
                peer.send(text)
                peer.recv(timeout=10)
            peer.close(4000, token)
    http = HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    http.request("POST", f"/ws/device/?token={token}")
    http.getresponse().read()
    http.close()
    for junk in (
        request(token)[:-2],
        b"\0" + request(token),
        request(token).replace(b"GET", b"G\tT"),
    ):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as peer:
            peer.sendall(junk)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):
                pass


@LOOPS
@pytest.mark.parametrize("form", ["text", "json"])
def test_no_token_is_logged_at_the_level_that_logs_most(
    tokens: Tokens, serve: Serve, loop: str, form: str
) -> None:
    gateway = serve(*LOOPBACK, "--loop", loop, "--log-level", "debug", "--log-format", form,
                    PYTHONASYNCIODEBUG="1", PYTHONDEVMODE="1")  # fmt: skip
    stranger = auth.new_token()
    for token in (*tokens.all, stranger):
        every_way_in(gateway, token)
    with contextlib.closing(sqlite3.connect(tokens.path)) as other, other:
        other.execute("UPDATE tokens SET revoked_at = 1")
    gateway.stop()
    log = gateway.log.read_text()
    assert log.count("device in user=1") >= 4
    for reason in ("missing", "unknown", "revoked", "expired", "scope"):
        assert reason in ("missing", *re.findall(r"reason=(\w+)", log))
    for token in (*tokens.all, stranger):
        assert token.removeprefix("wsg_") not in log
        assert auth.hash_token(token) not in log


@LOOPS
def test_each_line_of_a_json_log_is_an_object(tokens: Tokens, serve: Serve, loop: str) -> None:
    gateway = serve(*LOOPBACK, "--loop", loop, "--log-format", "json", "--log-level", "debug")
    every_way_in(gateway, tokens.valid)
    every_way_in(gateway, tokens.revoked)
    assert gateway.stop() == 0
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    messages = [line["message"] for line in lines]
    for beginning in ("wsgateway ", "device in ", "device refused ", "draining ", "stopped"):
        assert any(message.startswith(beginning) for message in messages), beginning


def test_instances_share_a_port(tokens: Tokens, serve: Serve) -> None:
    first = serve(*LOOPBACK, "--set", "server.reuse_port=true", "--set", "server.instance=one")
    again = ("--port", str(first.port), "--set", "server.reuse_port=true")
    second = serve(*LOOPBACK, *again, "--set", "server.instance=two")
    assert second.port == first.port
    with contextlib.ExitStack() as stack:
        devices = [stack.enter_context(device(first, tokens.valid)) for _ in range(32)]
        assert {ping(each) for each in devices} == {"pong"}
        # The kernel spreads them: that all 32 came to one has a chance of 2 ** -31.
        assert all(" device in " in gateway.log.read_text() for gateway in (first, second))
        assert first.stop() == 0
        with device(second, tokens.valid) as late:
            assert ping(late) == "pong"
