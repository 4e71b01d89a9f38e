"""What the tests start: gateways in this process, gateways as processes, devices, databases."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
import uvloop
from websockets.asyncio.client import ClientConnection, connect

from wsgateway import auth, config, server, store
from wsgateway.reload import Changes

LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.SelectorEventLoop,
}


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every asynchronous test runs on both event loops."""
    return LOOPS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the tests that need redis-server, so that they can be left out where there is none.

    On the second loop, most of what these wait for is Redis: a run that is to be quick leaves it out.
    """
    for item in items:
        if "redis_server" in getattr(item, "fixturenames", ()):
            item.add_marker("redis")
            if "[asyncio" in item.name:
                item.add_marker("again")


@dataclass
class Accounts:
    """A token database with a user (1) who has a primary device (1), and ways to change it."""

    path: Path
    token: str = ""

    async def add_token(self, user_id: int = 1, **options: Any) -> str:
        """A new token of a user."""
        token = auth.new_token()
        async with store.open_to_write(self.path) as db:
            await db.add_token(
                auth.hash_token(token), user_id, options.pop("scope", "device"), **options
            )
        return token

    async def add_user(self, name: str, device: str | None = None) -> tuple[int, int | None]:
        """A new user, with a primary device of that name if one is given."""
        async with store.open_to_write(self.path) as db:
            user_id = await db.add_user(name)
            device_id = await db.add_device(device) if device else None
            if device_id is not None:
                await db.bind(user_id, device_id)
        return user_id, device_id

    def execute(self, sql: str, *values: object) -> None:
        """Change the database as another program would."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute(sql, values)


@pytest.fixture
async def accounts(tmp_path: Path) -> Accounts:
    path = tmp_path / "wsgateway.db"
    made = Accounts(path)
    async with store.open_to_write(path, create=True) as db:
        user_id = await db.add_user("alice")
        await db.bind(user_id, await db.add_device("speaker"))
    made.token = await made.add_token()
    return made


@dataclass
class Instance:
    """A gateway that runs in this process."""

    running: server.Running
    stop: asyncio.Event
    task: asyncio.Task[None]
    token: str
    overrides: dict[str, object]
    """What is configured; a reload reads it again."""

    async def reload(self, **overrides: object) -> Changes:
        """Change the configuration and have it read again."""
        self.overrides |= overrides
        return await self.running.reloader.reload()

    @property
    def port(self) -> int:
        return self.running.addresses[0][1]

    def url(self, token: str | None = None, path: str = "/ws/device/") -> str:
        """The address of a device; with ``token=""``, without one."""
        token = self.token if token is None else token
        query = f"?token={token}" if token else ""
        return f"ws://127.0.0.1:{self.port}{path}{query}"

    @contextlib.asynccontextmanager
    async def device(
        self, token: str | None = None, **options: Any
    ) -> AsyncIterator[ClientConnection]:
        """A connected device that has received its connection_status."""
        async with connect(self.url(token), compression=None, **options) as device:
            status = orjson.loads(await device.recv())
            assert status["type"] == "connection_status"
            yield device

    @property
    def api_url(self) -> str:
        """Where the HTTP API is."""
        assert self.running.api_address is not None
        host, port = self.running.api_address[:2]
        return f"http://{host}:{port}"

    async def shut_down(self) -> None:
        self.stop.set()
        await self.task


def settings(accounts: Accounts, **overrides: object) -> config.Config:
    """A configuration for tests: loopback, a free port, quick polling. Keys are written a__b."""
    return loaded(accounts, overrides).config


def loaded(accounts: Accounts, overrides: Mapping[str, object]) -> config.Loaded:
    """The same, with where each value came from."""
    flags: dict[str, object] = {
        "server.host": "127.0.0.1",
        "server.port": 0,
        "auth.database": str(accounts.path),
        "auth.poll_interval": 0.05,
        "drain.window": 2,
        "api.port": 0,
        "server.instance": "here",
    }
    flags |= {key.replace("__", ".", 1): value for key, value in overrides.items()}
    return config.load(None, environ={}, flags=flags)


@contextlib.asynccontextmanager
async def running_gateway(accounts: Accounts, **overrides: object) -> AsyncIterator[Instance]:
    """A gateway in this process; drained when leaving."""
    ready: asyncio.Future[server.Running] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(
        server.serve(
            settings(accounts, **overrides), stop, ready=ready.set_result,
            read=lambda: loaded(accounts, overrides),
        )
    )  # fmt: skip
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        ready.cancel()
        task.result()
    instance = Instance(ready.result(), stop, task, accounts.token, overrides)
    try:
        yield instance
    finally:
        await instance.shut_down()


@pytest.fixture
async def gateway(accounts: Accounts) -> AsyncIterator[Instance]:
    """A gateway with the default limits."""
    async with running_gateway(accounts) as instance:
        yield instance


async def ask(device: ClientConnection, message: object) -> dict[str, Any]:
    """Send a message (bytes and texts as they are, the rest as JSON) and read the next one."""
    raw = message if isinstance(message, str | bytes) else orjson.dumps(message).decode()
    await device.send(raw)
    answer: dict[str, Any] = orjson.loads(await device.recv())
    return answer


async def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    """Let the loop run until a condition holds; fails after so many seconds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0)


class RedisServer:
    """A redis-server process on a free port, with its files in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.options: list[str] = []
        """More words of its command line, from the next start on."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it; returns once it answers."""
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--dir", str(self.folder), "--logfile", "redis.log", *self.options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
        raise AssertionError("redis-server does not start")

    def call(self, *words: str | bytes | int, timeout: float = 10) -> Any:
        """What a command answers, as redis-py reads it."""
        with redis.Redis(port=self.port, socket_timeout=timeout) as client:
            return client.execute_command(*words)

    def send_signal(self, number: int) -> None:
        """SIGSTOP freezes it, SIGCONT goes on, SIGKILL kills it."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, frozen or not; returns once it is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real redis-server, empty and running."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop(signal.SIGKILL)


@dataclass
class Process:
    """A gateway that runs as a process of its own."""

    popen: subprocess.Popen[str]
    port: int
    api_port: int
    log: Path

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(20)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment without configuration, with state in the test's folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WSGATEWAY_")}
    return kept | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONUNBUFFERED": "1",
        "WSGATEWAY_API_PORT": "0",
    }


@pytest.fixture
def cli(
    tmp_path: Path, environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `wsgateway ARGUMENTS...` in the test's folder."""

    def run(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "wsgateway", *arguments],
            input=stdin, capture_output=True, text=True, cwd=tmp_path, timeout=30,
            env=environment | environ,
        )  # fmt: skip

    return run


@pytest.fixture
def serve(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Process]]:
    """Runs `wsgateway serve ARGUMENTS...` on a free port; killed at the end if still there.

    ``launcher`` is a command that becomes the gateway.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, launcher: Sequence[str] = (), pass_fds: Sequence[int] = (), **environ: str
    ) -> Process:
        log = tmp_path / f"serve-{len(started)}.log"
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                [*launcher, sys.executable, "-m", "wsgateway", "serve", "--port", "0", *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
                cwd=tmp_path, env=environment | environ, pass_fds=pass_fds,
            )  # fmt: skip
        started.append(popen)
        while popen.poll() is None:
            ready = r" ready .*devices=\S*:(\d+) api=(?:\S*:(\d+)|off) "
            if found := re.search(ready, log.read_text()):
                return Process(popen, int(found[1]), int(found[2] or 0), log)
        raise AssertionError(f"serve ended with {popen.returncode}: {log.read_text()}")

    yield start
    for popen in started:
        popen.kill()
        popen.wait()
        assert popen.stdout is not None
        popen.stdout.close()
