"""Who comes in, who is cut, and what happens to both while the token database is in trouble.

Real database files, changed as another program changes them, and devices on real sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.conftest import Accounts, Instance, ask, eventually, running_gateway
from wsgateway import config, store
from wsgateway.auth import Authenticator, hash_token, new_token
from wsgateway.errors import Refused
from wsgateway.metrics import Metrics

PING = {"type": "ping"}


class Door:
    """An authenticator that answers, and how often it said that the database changed."""

    def __init__(self, accounts: Accounts, **settings: Any) -> None:
        self.metrics = Metrics()
        self.changes = 0
        self.authenticator = Authenticator(
            config.Auth(**{"poll_interval": 0.05} | settings), accounts.path, self.metrics
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Door]:
        async with self.authenticator.running(self._changed):
            yield self

    def _changed(self) -> None:
        self.changes += 1

    async def ask(self, token: str) -> int | str:
        """The user that a token stands for, or the reason why it does not."""
        try:
            return (await self.authenticator.identify(token)).user_id
        except Refused as error:
            return error.reason


def door(accounts: Accounts, **settings: Any) -> contextlib.AbstractAsyncContextManager[Door]:
    return Door(accounts, **settings).running()


@contextlib.contextmanager
def locked(accounts: Accounts) -> Iterator[Callable[[], None]]:
    """Hold the database so that nobody can read it; yields what lets it go."""
    with contextlib.closing(sqlite3.connect(accounts.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other.rollback


def without_wal(accounts: Accounts) -> None:
    """Let writers lock out readers, as they do on file systems without shared memory."""
    with contextlib.closing(sqlite3.connect(accounts.path, isolation_level=None)) as other:
        assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)


async def knock(gateway: Instance, token: str | None = None) -> int:
    """101 if a device comes in, else the status it is refused with."""
    try:
        async with gateway.device(token):
            return 101
    except InvalidStatus as error:
        response = error.response
    assert (response.status_code == 503) == ("Retry-After" in response.headers)
    return response.status_code


async def knock_until(gateway: Instance, status: int, token: str | None = None) -> None:
    async with asyncio.timeout(10):
        while await knock(gateway, token) != status:
            pass


async def close_code(device: ClientConnection) -> int | None:
    """The code that the gateway ends a device with, which hears nothing else before."""
    with pytest.raises(ConnectionClosed) as caught:
        async with asyncio.timeout(10):
            await device.recv()
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code


def lines(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


# Whom a token stands for.


async def test_a_token_stands_for_its_user_and_device(accounts: Accounts) -> None:
    bob, porch = await accounts.add_user("bob", "porch")
    carol, _ = await accounts.add_user("carol")
    later = int(time.time()) + 1000
    tokens = [
        await accounts.add_token(),
        await accounts.add_token(bob, device_id=porch, expires_at=later),
        await accounts.add_token(carol),
    ]
    async with door(accounts) as ours:
        found = [await ours.authenticator.identify(token) for token in tokens]
    assert [(each.user_id, each.device_id, each.expires_at) for each in found] == [
        (1, 1, None),
        (bob, porch, later),
        (carol, None, None),
    ]


REASONS: dict[str, str] = {
    "revoked": "UPDATE tokens SET revoked_at = unixepoch() WHERE id = ?",
    "expired": "UPDATE tokens SET expires_at = unixepoch() WHERE id = ?",
    "disabled": "UPDATE users SET active = 0 WHERE id = (SELECT user_id FROM tokens WHERE id = ?)",
    "scope": "UPDATE tokens SET scope = 'api' WHERE id = ?",
    "unknown": "DELETE FROM tokens WHERE id = ?",
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("known", [False, True], ids=["never seen", "remembered"])
async def test_a_token_that_opens_nothing_is_refused_also_if_it_is_remembered(
    accounts: Accounts, reason: str, known: bool
) -> None:
    async with door(accounts, cache_ttl=1000) as ours:
        if known:
            assert await ours.ask(accounts.token) == 1
        accounts.execute(REASONS[reason], 1)
        if known:
            await eventually(lambda: ours.changes)
        assert await ours.ask(accounts.token) == reason


@pytest.mark.parametrize(
    "token",
    ["", "x", "wsg_", "x" * 256, "x" * 257, "x" * 100_000, "\0", "'; DROP TABLE users --", "令牌",
     "\udcff\udcfe"],
    ids=ascii,
)  # fmt: skip
async def test_what_is_no_token_is_unknown(accounts: Accounts, token: str) -> None:
    async with door(accounts) as ours:
        assert await ours.ask(token) == "unknown"
        assert await ours.ask(accounts.token) == 1


async def test_a_token_of_bytes_that_are_no_text_is_refused_as_any_other(
    gateway: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(
        b"GET /ws/device/ HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Authorization: Token \xff\xfe\r\n\r\n"
    )
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert answer.endswith(b'\r\n\r\n{"error":"unauthorized"}')
    assert not lines(caplog, "failed")


# What is remembered.


async def test_a_token_is_looked_up_once_while_it_is_remembered(accounts: Accounts) -> None:
    async with door(accounts, cache_ttl=1000) as ours:
        assert [await ours.ask(accounts.token) for _ in range(3)] == [1, 1, 1]
        assert ours.metrics.lookups == {"database": 1, "cache": 2}
        assert [await ours.ask("nobody") for _ in range(3)] == ["unknown"] * 3
        assert ours.metrics.lookups == {"database": 4, "cache": 2}, "only what is valid is kept"


async def test_nothing_is_remembered_where_that_is_switched_off(accounts: Accounts) -> None:
    async with door(accounts, cache_ttl=0) as ours:
        assert [await ours.ask(accounts.token) for _ in range(3)] == [1, 1, 1]
        assert ours.metrics.lookups == {"database": 3}


async def test_the_token_remembered_longest_makes_room(accounts: Accounts) -> None:
    tokens = [await accounts.add_token() for _ in range(3)]
    async with door(accounts, cache_ttl=1000, cache_size=2) as ours:
        for token in (*tokens, tokens[2], tokens[1], tokens[0]):
            assert await ours.ask(token) == 1
        assert ours.metrics.lookups == {"database": 4, "cache": 2}


async def test_a_remembered_token_expires_on_time(accounts: Accounts) -> None:
    expires_at = int(time.time()) + 2
    token = await accounts.add_token(expires_at=expires_at)
    async with door(accounts, cache_ttl=1000) as ours:
        assert await ours.ask(token) == 1
        await eventually(lambda: time.time() >= expires_at)
        assert await ours.ask(token) == "expired"
        assert ours.metrics.lookups == {"database": 1}


async def test_what_another_process_changes_is_noticed(
    accounts: Accounts, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    async with door(accounts, cache_ttl=1000) as ours:
        assert await ours.ask(accounts.token) == 1
        place = f"auth.database={accounts.path}"
        done = await asyncio.to_thread(
            cli, "token", "revoke", "-", "--set", place, stdin=accounts.token
        )
        assert done.returncode == 0, done.stderr
        await eventually(lambda: ours.changes)
        assert await ours.ask(accounts.token) == "revoked"


async def test_nothing_is_forgotten_while_nothing_changes(accounts: Accounts) -> None:
    async with door(accounts, cache_ttl=1000, poll_interval=0.01) as ours:
        for _ in range(20):
            assert await ours.ask(accounts.token) == 1
            await asyncio.to_thread(lambda: None)
        assert ours.metrics.lookups["database"] == 1
        assert ours.changes == 0


# Many at once, and a database that does not answer.


async def test_five_hundred_different_tokens_are_told_apart(accounts: Accounts) -> None:
    tokens = {new_token(): number for number in range(500)}
    async with store.open_to_write(accounts.path) as db:
        for token, number in tokens.items():
            user = await db.add_user(f"user-{number}", 1000 + number)
            await db.add_token(hash_token(token), user, "device")
    async with running_gateway(accounts) as gateway, contextlib.AsyncExitStack() as stack:
        await asyncio.gather(
            *(stack.enter_async_context(gateway.device(token)) for token in tokens)
        )
        metrics, hub = gateway.running.instance.metrics, gateway.running.instance.gateway.hub
        assert metrics.lookups == {"database": 500}
        assert metrics.opened == 500
        for number in tokens.values():
            assert len(hub.members(f"user_{1000 + number}")) == 1


async def test_look_ups_beyond_the_cap_are_refused_at_once(accounts: Accounts) -> None:
    without_wal(accounts)
    others = [await accounts.add_token() for _ in range(4)]
    async with door(accounts, max_lookups=3, lookup_timeout=30) as ours:
        with locked(accounts) as let_go:
            waiting = [asyncio.create_task(ours.ask(token)) for token in others[:3]]
            await asyncio.wait(waiting, timeout=0)
            async with asyncio.timeout(5):
                assert await ours.ask(others[3]) == "lookups"
            assert not any(task.done() for task in waiting)
            let_go()
        assert await asyncio.gather(*waiting) == [1, 1, 1]
        assert await ours.ask(others[3]) == 1


async def test_a_look_up_that_takes_too_long_is_refused_and_harms_nobody_later(
    accounts: Accounts,
) -> None:
    without_wal(accounts)
    async with door(accounts, lookup_timeout=0.3) as ours:
        with locked(accounts) as let_go:
            for _ in range(2):
                async with asyncio.timeout(5):
                    refused = await asyncio.gather(*(ours.ask(f"{n}") for n in range(20)))
                assert refused == ["database"] * 20
            let_go()
        async with asyncio.timeout(5):
            while await ours.ask(accounts.token) != 1:
                pass
        assert await ours.ask("0") == "unknown"


async def test_a_client_that_leaves_does_not_take_the_answer_from_others(
    accounts: Accounts,
) -> None:
    without_wal(accounts)
    async with door(accounts, lookup_timeout=30) as ours:
        with locked(accounts) as let_go:
            asking = [asyncio.create_task(ours.ask(accounts.token)) for _ in range(3)]
            await asyncio.wait(asking, timeout=0)
            asking[0].cancel()
            await asyncio.wait(asking[:1])
            let_go()
        assert await asyncio.gather(*asking[1:]) == [1, 1]
        assert await ours.ask(accounts.token) == 1


async def test_while_the_database_is_locked_devices_stay_and_new_ones_get_503(
    accounts: Accounts, caplog: pytest.LogCaptureFixture
) -> None:
    without_wal(accounts)
    async with (
        running_gateway(accounts, auth__lookup_timeout=0.3, auth__cache_ttl=0) as gateway,
        gateway.device() as device,
    ):
        with locked(accounts) as let_go:
            knocking = asyncio.create_task(knock(gateway))
            while not knocking.done():
                assert (await ask(device, PING))["type"] == "pong"
                await asyncio.wait([knocking], timeout=0.05)
            assert knocking.result() == 503
            assert await asyncio.gather(*(knock(gateway) for _ in range(20))) == [503] * 20
            await eventually(lambda: lines(caplog, "database lost"))
            let_go()
        await knock_until(gateway, 101)
        await eventually(lambda: lines(caplog, "database back"))
        assert (await ask(device, PING))["type"] == "pong"
        assert (lines(caplog, "database lost"), lines(caplog, "database back")) == (1, 1)


async def test_who_writes_does_not_lock_out_who_asks(accounts: Accounts) -> None:
    async with running_gateway(accounts, auth__cache_ttl=0) as gateway:
        async with store.open_to_write(accounts.path) as db:
            await db.add_user("bob")
            assert await knock(gateway) == 101
        with locked(accounts):
            assert await knock(gateway) == 101


# A database file that comes and goes.


def _away(path: Path, away: Path) -> None:
    path.rename(away)


def _overlay(content: bytes) -> Callable[[Path, Path], None]:
    def replace(path: Path, away: Path) -> None:
        path.rename(away)
        path.write_bytes(content)

    return replace


def _deleted(path: Path, away: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as source:
        source.execute("PRAGMA wal_autocheckpoint = 0")
        with contextlib.closing(sqlite3.connect(away)) as copy:
            source.backup(copy)
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def _other_program(path: Path, away: Path) -> None:
    path.rename(away)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")


def _folder(path: Path, away: Path) -> None:
    path.rename(away)
    path.mkdir()


BREAKS: dict[str, Callable[[Path, Path], None]] = {
    "moved away": _away,
    "deleted with its log": _deleted,
    "replaced by an empty file": _overlay(b""),
    "replaced by garbage": _overlay(os.urandom(8192)),
    "replaced by another program's": _other_program,
    "replaced by a folder": _folder,
}


@pytest.mark.parametrize("fault", BREAKS)
async def test_while_the_database_is_gone_devices_stay_and_new_ones_get_503_until_it_is_back(
    accounts: Accounts, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    path, away = accounts.path, tmp_path / "away.db"
    async with running_gateway(accounts) as gateway, gateway.device() as device:
        BREAKS[fault](path, away)
        before = path.read_bytes() if path.is_file() else None
        await knock_until(gateway, 503)
        await eventually(lambda: lines(caplog, "database lost"))
        assert await asyncio.gather(*(knock(gateway) for _ in range(20))) == [503] * 20
        assert (await ask(device, PING))["type"] == "pong"
        assert (path.read_bytes() if path.is_file() else None) == before, "no database appears"
        assert path.is_dir() == (fault == "replaced by a folder")
        if path.is_dir():
            path.rmdir()
        away.rename(path)
        await knock_until(gateway, 101)
        assert await knock(gateway, "nobody") == 403
        assert (await ask(device, PING))["type"] == "pong"
        await eventually(lambda: lines(caplog, "database back"))
        assert (lines(caplog, "database lost"), lines(caplog, "database back")) == (1, 1)


async def test_another_database_in_its_place_counts_from_then_on(
    accounts: Accounts, tmp_path: Path
) -> None:
    others = Accounts(tmp_path / "others.db")
    async with store.open_to_write(others.path, create=True) as db:
        await db.add_user("mallory", 1)
        await db.add_user("bob", 2)
    revoked = await others.add_token(1)
    others.execute("UPDATE tokens SET revoked_at = 1")
    token = await others.add_token(2)
    async with running_gateway(accounts) as gateway, gateway.device() as device:
        newest = await accounts.add_token()
        for suffix in ("-wal", "-shm"):  # SQLite would take them for the new file's
            Path(f"{accounts.path}{suffix}").unlink()
        others.path.rename(accounts.path)
        await knock_until(gateway, 101, token)
        for stranger in (accounts.token, newest, revoked):
            assert await knock(gateway, stranger) == 403
        assert (await ask(device, PING))["type"] == "pong", "its token was not revoked"


@pytest.mark.faults
async def test_on_a_full_disk_devices_come_in_and_only_commands_that_write_fail(
    accounts: Accounts, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    try:
        small = Accounts(disk / "w.db", accounts.token)
        shutil.copy(accounts.path, small.path)
        place = ("--set", f"auth.database={small.path}")
        async with running_gateway(small, auth__cache_ttl=0) as gateway, gateway.device() as device:
            with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while filler.write(bytes(4096)):
                    pass
            done = await asyncio.to_thread(cli, "user", "add", "bob", *place)
            assert done.returncode == 1
            assert (
                done.stderr == f"wsgateway: {small.path}: the disk is full: nothing was changed\n"
            )
            assert await knock(gateway) == 101
            assert (await ask(device, PING))["type"] == "pong"
            (disk / "filler").unlink()
            done = await asyncio.to_thread(cli, "user", "add", "bob", *place)
            assert (done.returncode, done.stdout) == (0, "user 2 added\n")
            assert await knock(gateway) == 101
    finally:
        subprocess.run(["umount", disk], check=True)


# Devices that are connected when the database changes.

CHANGES: dict[str, tuple[str, int]] = {
    "token revoked": ("UPDATE tokens SET revoked_at = unixepoch() WHERE id = 2", 4001),
    "token deleted": ("DELETE FROM tokens WHERE id = 2", 4001),
    "token expired": ("UPDATE tokens SET expires_at = unixepoch() - 1 WHERE id = 2", 4001),
    "token of another scope": ("UPDATE tokens SET scope = 'api' WHERE id = 2", 4001),
    "user disabled": ("UPDATE users SET active = 0 WHERE id = 2", 4001),
    "user deleted": ("DELETE FROM users WHERE id = 2", 4001),
    "no primary device": ("DELETE FROM bindings WHERE user_id = 2 AND device_id = 2", 1012),
    "other primary device": (
        "UPDATE bindings SET device_id = 1 WHERE user_id = 2 AND is_primary = 1",
        1012,
    ),
    "bound to a device": ("UPDATE tokens SET device_id = 3 WHERE id = 2", 1012),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_ends_the_connections_it_concerns_and_no_other(
    accounts: Accounts, change: str
) -> None:
    bob, _ = await accounts.add_user("bob", "porch")
    await accounts.add_user("carol", "attic")
    token = await accounts.add_token(bob)
    sql, code = CHANGES[change]
    async with (
        running_gateway(accounts, drain__window=1) as gateway,
        gateway.device() as bystander,
        gateway.device(token) as first,
        gateway.device(token) as second,
    ):
        with contextlib.closing(sqlite3.connect(accounts.path, isolation_level=None)) as other:
            other.execute("PRAGMA foreign_keys = 1")
            other.execute(sql)
        assert await close_code(first) == code
        assert await close_code(second) == code
        assert (await ask(bystander, PING))["type"] == "pong"
        assert await knock(gateway, token) == (403 if code == 4001 else 101)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("token revoke TOKEN", 4001),
        ("token revoke 2", 4001),
        ("user disable bob", 4001),
        ("device unbind porch --user bob", 4001),
        ("device primary attic --user bob", None),
        ("device add cellar --user bob", None),
        ("user add dave", None),
    ],
)
async def test_a_command_cuts_whom_it_concerns(
    accounts: Accounts,
    cli: Callable[..., subprocess.CompletedProcess[str]],
    command: str,
    code: int | None,
) -> None:
    bob, porch = await accounts.add_user("bob", "porch")
    async with store.open_to_write(accounts.path) as db:
        await db.bind(bob, await db.add_device("attic"))
    token = await accounts.add_token(bob, device_id=porch)
    last = await accounts.add_token()
    words = command.replace("TOKEN", token).split()
    async with (
        running_gateway(accounts) as gateway,
        gateway.device(token) as device,
        gateway.device(last) as control,
        gateway.device() as bystander,
    ):
        place = f"auth.database={accounts.path}"
        done = await asyncio.to_thread(cli, *words, "--set", place)
        assert done.returncode == 0, done.stderr
        if code is not None:
            assert await close_code(device) == code
        accounts.execute(REASONS["revoked"], 3)
        assert await close_code(control) == 4001  # so the command was looked at by now
        assert (await ask(bystander, PING))["type"] == "pong"
        if code is None:
            assert (await ask(device, PING))["type"] == "pong"


async def test_the_primary_device_of_a_connected_token_moves_it_to_the_right_group(
    accounts: Accounts, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    async with store.open_to_write(accounts.path) as db:
        await db.bind(1, await db.add_device("porch"))
    async with running_gateway(accounts) as gateway:
        place = f"auth.database={accounts.path}"
        async with gateway.device() as device:
            command = ("device", "primary", "porch", "--user", "alice", "--set", place)
            assert (await asyncio.to_thread(cli, *command)).returncode == 0
            assert await close_code(device) == 1012
        async with gateway.device():
            hub = gateway.running.instance.gateway.hub
            assert (len(hub.members("device_1")), len(hub.members("device_2"))) == (0, 1)


async def test_a_token_that_expires_ends_its_connection(accounts: Accounts) -> None:
    expires_at = int(time.time()) + 2
    token = await accounts.add_token(expires_at=expires_at)
    async with running_gateway(accounts, keepalive__interval=0.2) as gateway:
        async with gateway.device(token) as device, gateway.device() as bystander:
            assert await close_code(device) == 4001
            assert time.time() >= expires_at
            assert (await ask(bystander, PING))["type"] == "pong"
        assert await knock(gateway, token) == 403


async def test_a_token_revoked_while_the_database_was_gone_is_cut_when_it_is_back(
    accounts: Accounts, tmp_path: Path
) -> None:
    away = tmp_path / "away.db"
    async with running_gateway(accounts) as gateway, gateway.device() as device:
        _deleted(accounts.path, away)
        await knock_until(gateway, 503)
        Accounts(away).execute(REASONS["revoked"], 1)
        away.rename(accounts.path)
        assert await close_code(device) == 4001
