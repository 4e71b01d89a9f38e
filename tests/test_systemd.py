"""What systemd hears of a gateway, the watchdog, and the sockets it passes: real datagrams, real
processes, and systemd's own program for socket activation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Accounts, Process, RedisServer, eventually, running_gateway
from tests.test_server import LOOPBACK, LOOPS, Tokens, device, ping, refused, tokens
from wsgateway.federation import STUCK_SECONDS
from wsgateway.systemd import Service

__all__ = ["refused", "tokens"]

Serve = Callable[..., Process]
ROOT = Path(__file__).parent.parent
QUICK = {"WATCHDOG_USEC": "600000"}
"""A report, and food for the watchdog, every 0.2 s."""


class Ear:
    """The socket on which systemd listens to a service."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0"))
        self._socket.settimeout(20)

    def hear(self, word: str) -> list[str]:
        """The lines of the next datagram that has a line which begins so."""
        while True:
            lines = self._socket.recv(4096).decode().splitlines()
            if any(line.startswith(word) for line in lines):
                return lines

    def heard(self, seconds: float = 0) -> list[str]:
        """The lines of all that waits, or comes within so many seconds."""
        lines = []
        until = time.monotonic() + seconds
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                self._socket.settimeout(max(0, until - time.monotonic()))
                lines += self._socket.recv(4096).decode().splitlines()
        self._socket.settimeout(20)
        return lines

    def close(self) -> None:
        self._socket.close()


def upgrade(token: str) -> bytes:
    """The request of a device."""
    return (
        f"GET /ws/device/?token={token} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    name = {"path": f"{tmp_path}/notify", "abstract": f"@wsgateway-test-{os.getpid()}"}
    with contextlib.closing(Ear(name[request.param])) as made:
        yield made


@pytest.fixture
def path_ear(tmp_path: Path) -> Iterator[Ear]:
    with contextlib.closing(Ear(f"{tmp_path}/notify")) as made:
        yield made


# What is told.


@LOOPS
def test_systemd_hears_when_it_serves_whom_and_when_it_leaves(
    tokens: Tokens, serve: Serve, ear: Ear, loop: str
) -> None:
    gateway = serve(*LOOPBACK, "--loop", loop, NOTIFY_SOCKET=ear.address, **QUICK)
    assert ear.hear("READY=1") == ["READY=1"]
    ear.hear("STATUS=serving: connections=0 users=0 mirror=off")
    with device(gateway, tokens.valid), device(gateway, tokens.valid):
        assert "WATCHDOG=1" in ear.hear("STATUS=serving: connections=2 users=1 mirror=off")
    ear.hear("STATUS=serving: connections=0 ")
    assert gateway.stop() == 0
    assert ear.hear("STOPPING=1") == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=20000000"]
    assert "systemd does not" not in gateway.log.read_text()


def test_it_is_watched_while_it_waits_for_the_last_device(
    tokens: Tokens, serve: Serve, path_ear: Ear
) -> None:
    gateway = serve(*LOOPBACK, NOTIFY_SOCKET=path_ear.address, **QUICK)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as stalled:
        stalled.sendall(upgrade(tokens.valid))
        path_ear.hear("STATUS=serving: connections=1")
        gateway.popen.send_signal(signal.SIGTERM)
        for _ in range(3):
            assert "WATCHDOG=1" in path_ear.hear("STATUS=draining: connections=1")


@pytest.mark.parametrize("arguments", [["--database", "none.db"], ["--host", "192.0.2.1"]])
def test_it_is_not_ready_when_it_cannot_start(
    tokens: Tokens,
    refused: Callable[..., subprocess.CompletedProcess[str]],
    path_ear: Ear,
    arguments: list[str],
) -> None:
    done = refused(*arguments, shell=f"export NOTIFY_SOCKET={path_ear.address}")
    assert done.returncode in (3, 78)
    assert not [line for line in path_ear.heard() if not line.startswith("STATUS=starting: ")]


def test_a_reload_says_when_it_began(path_ear: Ear) -> None:
    service = Service({"NOTIFY_SOCKET": path_ear.address})
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    with service.reloading():
        _, at = path_ear.hear("RELOADING=1")
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert before <= int(at.removeprefix("MONOTONIC_USEC=")) <= after
    assert path_ear.hear("READY=1") == ["READY=1"]


def test_sighup_reloads_between_two_words(tokens: Tokens, serve: Serve, path_ear: Ear) -> None:
    gateway = serve(*LOOPBACK, NOTIFY_SOCKET=path_ear.address)
    path_ear.hear("READY=1")
    gateway.popen.send_signal(signal.SIGHUP)
    path_ear.hear("RELOADING=1")
    path_ear.hear("READY=1")
    assert gateway.stop() == 0


def test_a_notify_socket_that_is_gone_is_one_line(
    tokens: Tokens, serve: Serve, tmp_path: Path
) -> None:
    gateway = serve(*LOOPBACK, NOTIFY_SOCKET=f"{tmp_path}/notify", **QUICK)
    with device(gateway, tokens.valid) as connection:
        assert ping(connection) == "pong"
        with contextlib.closing(Ear(f"{tmp_path}/notify")) as ear:
            assert ear.hear("READY=1")[0] == "READY=1", "what was not heard is said again"
            ear.hear("WATCHDOG=1")
        (tmp_path / "notify").unlink()
        assert ping(connection) == "pong"
    assert gateway.stop() == 0
    log = gateway.log.read_text()
    assert log.count("systemd does not hear this service: No such file or directory") in (1, 2)
    assert log.count("systemd hears this service again") == 1


@pytest.mark.parametrize("address", ["vsock:2:1234", "/" + "x" * 200, "@", "notify", "\udcff"])
async def test_an_address_that_is_none_harms_nobody(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service({"NOTIFY_SOCKET": address})
    for _ in range(3):
        service.notify_ready()
    assert len(caplog.messages) == 1


def test_a_systemd_that_does_not_read_holds_nobody(
    path_ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service({"NOTIFY_SOCKET": path_ear.address})
    for _ in range(5000):  # the kernel holds a few hundred
        service.notify_ready()
    assert caplog.messages == [
        "systemd does not hear this service: Resource temporarily unavailable"
    ]


def test_whatever_is_started_from_here_is_not_this_service() -> None:
    environ = {
        "NOTIFY_SOCKET": "/none", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "LISTEN_PID": "1",
        "LISTEN_FDS": "1", "LISTEN_FDNAMES": "ws", "HOME": "/",
    }  # fmt: skip
    assert Service(environ).sockets == {}, "they are for another process"
    assert environ == {"HOME": "/"}


# The watchdog.


@pytest.mark.parametrize(
    ("pid", "is_fed"), [("", True), (str(os.getpid()), True), ("1", False)],
    ids=["anybody's", "ours", "another's"],
)  # fmt: skip
async def test_only_the_own_watchdog_is_fed(path_ear: Ear, pid: str, is_fed: bool) -> None:
    service = Service({"NOTIFY_SOCKET": path_ear.address, "WATCHDOG_PID": pid, **QUICK})
    task = asyncio.create_task(service.report(lambda: "well", lambda: True))
    lines: list[str] = []
    for _ in range(3):
        service.notify_ready()
        lines += await asyncio.to_thread(path_ear.hear, "STATUS=serving: well")
    task.cancel()
    assert ("WATCHDOG=1" in lines) == is_fed


async def test_the_watchdog_is_not_fed_while_something_is_stuck(
    path_ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service({"NOTIFY_SOCKET": path_ear.address, **QUICK})
    alive = True
    task = asyncio.create_task(service.report(lambda: f"alive={alive}", lambda: alive))
    assert "WATCHDOG=1" in await asyncio.to_thread(path_ear.hear, "STATUS=starting: alive=True")
    alive = False
    for _ in range(3):
        lines = await asyncio.to_thread(path_ear.hear, "STATUS=starting: alive=False")
        assert "WATCHDOG=1" not in lines
    assert len(caplog.messages) == 1
    alive = True
    assert "WATCHDOG=1" in await asyncio.to_thread(path_ear.hear, "STATUS=starting: alive=True")
    task.cancel()


@LOOPS
def test_a_blocked_loop_does_not_feed_the_watchdog(
    tokens: Tokens, serve: Serve, path_ear: Ear, tmp_path: Path, loop: str
) -> None:
    gateway = serve(
        *LOOPBACK, "--loop", loop, "--set", "handlers.modules=tests.unit_handlers",
        NOTIFY_SOCKET=path_ear.address, PYTHONPATH=str(ROOT), **QUICK,
    )  # fmt: skip
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with device(gateway, tokens.valid) as connection:
        connection.send(json.dumps({"type": "block", "message": str(pipe)}))
        with pipe.open("w") as writer:  # which waits for the reader
            path_ear.heard()
            assert path_ear.heard(seconds=1.5) == [], "seven meals were due"
            writer.write("go on")
        assert "go on" in str(connection.recv(timeout=10))
        path_ear.hear("WATCHDOG=1")


async def test_the_mirror_turns_whatever_redis_does(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with running_gateway(
        accounts, redis__url=redis_server.url, redis__timeout=0.2
    ) as gateway:
        federation = gateway.running.instance.federation
        assert federation is not None
        mirror = federation.mirror

        async def turns(state: str) -> None:
            await eventually(lambda: federation.state == state, 20)
            for _ in range(2):
                before = mirror.turned_at
                await eventually(lambda at=before: mirror.turned_at > at, 20)
            assert federation.is_turning

        await turns("up")
        redis_server.send_signal(signal.SIGSTOP)
        await turns("silent")
        redis_server.stop(signal.SIGKILL)
        await turns("unreachable")
        mirror.turned_at -= STUCK_SECONDS + 1
        assert not federation.is_turning
        await eventually(lambda: federation.is_turning, 20)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_systemd_hears_of_a_redis_that_is_away_and_the_watchdog_is_fed(
    tokens: Tokens, serve: Serve, redis_server: RedisServer, path_ear: Ear, loop: str
) -> None:
    redis = ("--set", f"redis.url={redis_server.url}", "--set", "redis.timeout=0.3")
    serve(*LOOPBACK, "--loop", loop, *redis, NOTIFY_SOCKET=path_ear.address, **QUICK)
    path_ear.hear("STATUS=serving: connections=0 users=0 mirror=up")
    redis_server.stop(signal.SIGKILL)
    for _ in range(5):
        assert "WATCHDOG=1" in path_ear.hear(
            "STATUS=serving: connections=0 users=0 mirror=unreachable"
        )


# The sockets.


PASSING = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
given = dict(each.split("=") for each in sys.argv[2].split())
os.environ.update({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", **given})
os.execv(sys.argv[3], sys.argv[3:])
"""


def passing(descriptor: int, variables: str = "") -> tuple[str, ...]:
    """A launcher that passes a descriptor to what it becomes, as systemd does."""
    return (sys.executable, "-c", PASSING, str(descriptor), variables)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def get(port: int, path: str) -> int:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=20)) as http:
        http.request("GET", path)
        return http.getresponse().status


@pytest.mark.systemd
@LOOPS
def test_systemd_starts_it_for_the_first_device(
    tokens: Tokens, environment: dict[str, str], path_ear: Ear, tmp_path: Path, loop: str
) -> None:
    ports = free_port(), free_port()
    with (tmp_path / "log").open("w+") as log:
        popen = subprocess.Popen(
            ["systemd-socket-activate", "--fdname=ws:http",
             *(f"--listen=127.0.0.1:{port}" for port in ports),
             *(f"--setenv={name}={value}" for name, value in environment.items()),
             f"--setenv=NOTIFY_SOCKET={path_ear.address}",
             sys.executable, "-m", "wsgateway", "serve", "--loop", loop],
            stdin=subprocess.DEVNULL, stderr=log, env=environment, cwd=tmp_path,
        )  # fmt: skip
        try:
            while "Listening on" not in (text := (tmp_path / "log").read_text()):
                assert popen.poll() is None, text
            gateway = Process(popen, *ports, tmp_path / "log")  # type: ignore[arg-type]
            with device(gateway, tokens.valid, open_timeout=20) as connection:
                assert ping(connection) == "pong"
                path_ear.hear("READY=1")
                assert get(ports[1], "/metrics") == 200
            assert gateway.stop() == 0
        finally:
            popen.kill()
            popen.wait()
    assert f" devices=127.0.0.1:{ports[0]} api=127.0.0.1:{ports[1]} " in gateway.log.read_text()


@LOOPS
def test_who_connects_during_a_restart_is_served_after_it(
    tokens: Tokens, serve: Serve, loop: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        start = [*LOOPBACK, "--loop", loop]
        passed = {"launcher": passing(held.fileno()), "pass_fds": [held.fileno()]}
        first = serve(*start, **passed)
        assert first.port == held.getsockname()[1]
        flags = Path(f"/proc/{first.popen.pid}/fdinfo/3").read_text().split("flags:")[1].split()[0]
        assert int(flags, 8) & os.O_CLOEXEC
        with device(first, tokens.valid) as connection:
            assert ping(connection) == "pong"
        assert first.stop() == 0
        with socket.create_connection(("127.0.0.1", first.port), timeout=20) as early:
            early.sendall(upgrade(tokens.valid))
            second = serve(*start, **passed)
            assert early.recv(12) == b"HTTP/1.1 101"
        assert second.stop() == 0


def test_sockets_for_another_process_are_left_alone(tokens: Tokens, serve: Serve) -> None:
    gateway = serve(*LOOPBACK, LISTEN_PID="1", LISTEN_FDS="x", LISTEN_FDNAMES="y:z")
    with device(gateway, tokens.valid) as connection:
        assert ping(connection) == "pong"


Open = Callable[[Path], Any]


def _listening(_: Path) -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def _unix(folder: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(f"{folder}/s")
    made.listen()
    return made


BAD: dict[str, tuple[Open, str, tuple[str, ...], str]] = {
    "no number of sockets": (_listening, "LISTEN_FDS=one", (), "$LISTEN_FDS = 'one': must be a w"),
    "no socket": (_listening, "LISTEN_FDS=0", (), "$LISTEN_FDS = '0': must be a whole number abo"),
    "too many": (_listening, "LISTEN_FDS=3", (), "$LISTEN_FDS = 3: at most two sockets"),
    "no process": (_listening, "LISTEN_PID=me", (), "$LISTEN_PID = 'me': must be a whole number"),
    "too many names": (_listening, "LISTEN_FDNAMES=ws:http", (), "names 2 sockets, $LISTEN_FDS says"),
    "a name of its own": (_listening, "LISTEN_FDNAMES=front", (), "FileDescriptorName= must be ws or"),
    "twice the same": (
        _listening, "LISTEN_FDS=2 LISTEN_FDNAMES=ws:ws", (), "two passed sockets are named",
    ),
    "two without a name": (_listening, "LISTEN_FDS=2", (), "'unknown': FileDescriptorName= must be"),
    "a file": (lambda folder: (folder / "f").open("w"), "", (), "'ws': Socket operation on non-soc"),
    "nothing": (_listening, "LISTEN_FDS=2 LISTEN_FDNAMES=ws:http", (), "'http': Bad file descript"),
    "one that does not listen": (
        lambda _: socket.socket(), "", (), "'ws' does not listen on TCP: ListenStream= takes a port",
    ),
    "datagrams": (
        lambda _: socket.socket(type=socket.SOCK_DGRAM), "", (), "'ws' does not listen on TCP",
    ),
    "a socket of the file system": (_unix, "", (), "'ws' does not listen on TCP"),
    "one for what is off": (
        _listening, "LISTEN_FDNAMES=http", ("--set", "api.enabled=false"), "api.enabled = false",
    ),
    "no period": (_listening, "WATCHDOG_USEC=20s", (), "$WATCHDOG_USEC = '20s': must be a whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_passed_and_makes_no_sense_is_one_line(
    tokens: Tokens, environment: dict[str, str], tmp_path: Path, case: str
) -> None:
    make, variables, arguments, sentence = BAD[case]
    with make(tmp_path) as opened:
        done = subprocess.run(
            [*passing(opened.fileno(), variables), sys.executable, "-m", "wsgateway", "serve",
             *LOOPBACK, "--port", "0", *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, cwd=tmp_path,
            env=environment, pass_fds=[opened.fileno()],
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (78, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert sentence in done.stderr


# The sandbox.

MDWE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(65, 1, 0, 0, 0):
    sys.exit(f"PR_SET_MDWE: {os.strerror(ctypes.get_errno())}: Linux 6.3 or newer is needed")
os.execv(sys.argv[1], sys.argv[1:])
"""


@LOOPS
def test_everything_works_where_no_memory_can_be_made_executable(
    tokens: Tokens, serve: Serve, redis_server: RedisServer, loop: str
) -> None:
    gateway = serve(
        *LOOPBACK, "--loop", loop, "--set", f"redis.url={redis_server.url}",
        "--set", "handlers.modules=tests.unit_handlers",
        launcher=(sys.executable, "-c", MDWE), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    with device(gateway, tokens.valid) as connection:
        assert ping(connection) == "pong"
        connection.send('{"type": "mdwe", "message": ""}')
        assert json.loads(connection.recv(timeout=10))["data"] == {"refused": 1}
        with contextlib.closing(HTTPConnection("127.0.0.1", gateway.api_port, timeout=20)) as http:
            headers = {"X-API-Key": tokens.scope, "Content-Type": "application/json"}
            http.request("POST", "/api/users/1/messages", '{"message": "hello"}', headers)
            assert http.getresponse().status == 200
        assert json.loads(connection.recv(timeout=10))["message"] == "hello"
    assert gateway.stop() == 0
    assert "redis up " in gateway.log.read_text()


def test_the_journal_gets_levels_in_place_of_times(
    tokens: Tokens, environment: dict[str, str], tmp_path: Path
) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        status = os.fstat(journal.fileno())
        variable = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        popen = subprocess.Popen(
            [sys.executable, "-m", "wsgateway", "serve", *LOOPBACK, "--port", "0"],
            stdin=subprocess.DEVNULL, stderr=journal, env=environment | variable, cwd=tmp_path,
        )  # fmt: skip
        while " ready " not in (text := (tmp_path / "journal").read_text()):
            assert popen.poll() is None, text
        popen.terminate()
        assert popen.wait(20) == 0
    lines = (tmp_path / "journal").read_text().splitlines()
    assert all(line.startswith(("<6>", "<4>")) for line in lines), lines
