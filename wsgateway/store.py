"""The database of users, devices and tokens: all SQL of the project.

Only this module says how they are kept. It knows neither sockets nor Redis nor who may connect: it
answers with rows. One file, one schema version; a token is stored as the SHA-256 of its text, in hex.

SQLite before 3.51.3 can corrupt a WAL when two connections checkpoint at once, so no connection
checkpoints by itself and writers take turns under a file lock, checkpointing before they leave.
Longer than 400 lines because SQL belongs in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pwd
import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import aiosqlite

from wsgateway.errors import Conflict, NotFound, StoreBusy, StoreError, StoreForeign, StoreMissing

APPLICATION_ID = 0x77736777
"""'wsgw' in the file's header: says that a file is ours before it is touched."""

BUSY_TIMEOUT = 0.25
"""Seconds that one query waits for a lock. Short, as queries wait in one thread, one after the other."""

INTACT_SECONDS = 0.01
"""How long it is believed that the file is still there: thousands connect in a second."""

LOCK_TIMEOUT = 5.0
"""Seconds that a command waits for another command that is writing."""

SQLITE_VERSION = sqlite3.sqlite_version

Scope = Literal["device", "api", "admin"]

MIGRATIONS = (
    """
    CREATE TABLE users (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
        created_at INTEGER NOT NULL DEFAULT (unixepoch())
    ) STRICT;
    CREATE TABLE devices (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at INTEGER NOT NULL DEFAULT (unixepoch())
    ) STRICT;
    CREATE TABLE bindings (
        user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        device_id INTEGER NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        is_primary INTEGER NOT NULL DEFAULT 0 CHECK (is_primary IN (0, 1)),
        PRIMARY KEY (user_id, device_id)
    ) STRICT, WITHOUT ROWID;
    CREATE UNIQUE INDEX one_primary_per_user ON bindings (user_id) WHERE is_primary = 1;
    CREATE TABLE tokens (
        id INTEGER PRIMARY KEY,
        hash TEXT NOT NULL UNIQUE CHECK (length(hash) = 64),
        user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        device_id INTEGER REFERENCES devices (id) ON DELETE CASCADE,
        scope TEXT NOT NULL CHECK (scope IN ('device', 'api', 'admin')),
        label TEXT NOT NULL DEFAULT '',
        created_at INTEGER NOT NULL DEFAULT (unixepoch()),
        expires_at INTEGER,
        revoked_at INTEGER
    ) STRICT;
    CREATE INDEX tokens_of_user ON tokens (user_id);
    CREATE TABLE properties (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    """,
)
"""Each entry takes the schema one version forward; user_version is how many were applied."""

_TOKEN_COLUMNS = """
    SELECT t.id, t.hash, t.user_id, u.name AS user_name, u.active AS user_active,
           coalesce(t.device_id, b.device_id) AS device_id, t.scope, t.label,
           t.created_at, t.expires_at, t.revoked_at
    FROM tokens t
    JOIN users u ON u.id = t.user_id
    LEFT JOIN bindings b ON b.user_id = t.user_id AND b.is_primary = 1
"""


class TokenRow(NamedTuple):
    """A token with its owner, as stored. Times are seconds since 1970, UTC.

    ``device_id`` is the token's own device, else the user's primary device, else None.
    """

    id: int
    hash: str
    user_id: int
    user_name: str
    user_active: int
    device_id: int | None
    scope: Scope
    label: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None


class Store:
    """An open database. Cancelling a method is safe; a query under way still ends in its thread."""

    def __init__(self, path: Path, connection: aiosqlite.Connection) -> None:
        self.path = path
        self._connection = connection
        self._file = _file_id(path)
        self._is_intact = False
        self._look_again_at = 0.0

    def intact(self) -> bool:
        """Whether the path still names the file that is open, as of 10 ms ago at most.

        A deleted file would go on answering. One stat() of a local file, a few microseconds.
        """
        now = time.monotonic()
        if now >= self._look_again_at:
            self._is_intact = self._file is not None and _file_id(self.path) == self._file
            self._look_again_at = now + INTACT_SECONDS
        return self._is_intact

    async def change_count(self) -> int:
        """A number that differs once another process has changed the database."""
        return int((await self._all("PRAGMA data_version"))[0][0])

    async def journal_mode(self) -> str:
        """How changes are journaled: 'wal', unless another program changed it."""
        return str((await self._all("PRAGMA journal_mode"))[0][0])

    async def damage(self) -> str | None:
        """The first thing that is wrong with the file, None if nothing.

        Reads all of it. Cancelling is safe and ends the reading.
        """
        try:
            answer = str((await self._all("PRAGMA quick_check(1)"))[0][0])
        except asyncio.CancelledError:
            await self._connection.interrupt()
            raise
        return None if answer == "ok" else answer

    async def tokens_by_hash(self, hashes: Sequence[str]) -> dict[str, TokenRow]:
        """The tokens with these hashes, in one query: 100 at once cost little more than one."""
        sql = f"{_TOKEN_COLUMNS} WHERE t.hash IN (SELECT value FROM json_each(?))"
        return {row[1]: TokenRow(*row) for row in await self._all(sql, json.dumps(list(hashes)))}

    async def tokens(
        self, user_id: int | None = None, *, after: int = 0, limit: int = -1
    ) -> list[TokenRow]:
        """All tokens, or those of a user, by id: those after an id, ``limit`` at most."""
        sql = (
            f"{_TOKEN_COLUMNS} WHERE (?1 IS NULL OR t.user_id = ?1) AND t.id > ?2"
            " ORDER BY t.id LIMIT ?3"
        )
        return [TokenRow(*row) for row in await self._all(sql, user_id, after, limit)]

    async def add_token(
        self,
        token_hash: str,
        user_id: int,
        scope: Scope,
        *,
        device_id: int | None = None,
        label: str = "",
        expires_at: int | None = None,
    ) -> int:
        """Store a token by its hash; its id. Raises NotFound where the device is not the user's."""
        if device_id is not None and device_id not in [
            binding["device_id"] for binding in await self.bindings(user_id)
        ]:
            raise NotFound(f"device {device_id} is not bound to user {user_id}")
        sql = (
            "INSERT INTO tokens (hash, user_id, device_id, scope, label, expires_at)"
            " VALUES (?, ?, ?, ?, ?, ?) RETURNING id"
        )
        return await self._insert(
            "the token", sql, token_hash, user_id, device_id, scope, label, expires_at
        )

    async def revoke(self, column: Literal["id", "hash"], value: int | str) -> TokenRow:
        """Revoke a token now; what it was. Revoking twice keeps the first time. Raises NotFound."""
        await self._all(
            f"UPDATE tokens SET revoked_at = coalesce(revoked_at, unixepoch()) WHERE {column} = ?",
            value,
        )
        rows = await self._all(f"{_TOKEN_COLUMNS} WHERE t.{column} = ?", value)
        if not rows:
            raise NotFound("no such token")
        return TokenRow(*rows[0])

    async def add_user(self, name: str, user_id: int | None = None) -> int:
        """Create a user; its id. Raises Conflict."""
        sql = "INSERT INTO users (id, name) VALUES (?, ?) RETURNING id"
        return await self._insert(f"user {name!r}", sql, user_id, name)

    async def users(self) -> list[dict[str, Any]]:
        """All users: ``{"id", "name", "active", "tokens"}``, ``tokens`` being how many are valid."""
        return await self._dicts(
            """SELECT id, name, active, (SELECT count(*) FROM tokens t WHERE t.user_id = users.id
               AND revoked_at IS NULL AND coalesce(expires_at, unixepoch() + 1) > unixepoch()) AS tokens
               FROM users ORDER BY id"""
        )

    async def exists(self, kind: Literal["user", "device"], number: int) -> bool:
        """Whether there is a user or device with that id."""
        return bool(await self._all(f"SELECT 1 FROM {kind}s WHERE id = ?", number))

    async def user_id(self, name_or_id: str) -> int:
        """The id of a user named or numbered so. Raises NotFound."""
        return await self._id_of("users", "user", name_or_id)

    async def device_id(self, name_or_id: str) -> int:
        """The id of a device named or numbered so. Raises NotFound."""
        return await self._id_of("devices", "device", name_or_id)

    async def set_active(self, user_id: int, active: bool) -> None:
        """Enable or disable a user."""
        await self._all("UPDATE users SET active = ? WHERE id = ?", int(active), user_id)

    async def remove_user(self, user_id: int) -> None:
        """Remove a user with all tokens and bindings. The next new user may get the same id."""
        await self._all("DELETE FROM users WHERE id = ?", user_id)

    async def add_device(self, name: str, device_id: int | None = None) -> int:
        """Create a device; its id. Raises Conflict."""
        sql = "INSERT INTO devices (id, name) VALUES (?, ?) RETURNING id"
        return await self._insert(f"device {name!r}", sql, device_id, name)

    async def devices(self) -> list[dict[str, Any]]:
        """All devices: ``{"id", "name", "users": [ids], "primary_of": [ids]}``."""
        rows = await self._dicts(
            """SELECT id, name, json_group_array(user_id) FILTER (WHERE user_id IS NOT NULL) AS users,
               json_group_array(user_id) FILTER (WHERE is_primary) AS primary_of
               FROM devices LEFT JOIN bindings ON device_id = id GROUP BY id ORDER BY id"""
        )
        lists = ("users", "primary_of")
        return [row | {name: json.loads(row[name]) for name in lists} for row in rows]

    async def bindings(self, user_id: int) -> list[dict[str, Any]]:
        """The devices of a user: ``{"device_id", "is_primary"}``."""
        sql = "SELECT device_id, is_primary FROM bindings WHERE user_id = ? ORDER BY device_id"
        return await self._dicts(sql, user_id)

    async def bind(self, user_id: int, device_id: int) -> bool:
        """Bind a device to a user; True if it became the primary, as a user's first one does."""
        primary = not any(row["is_primary"] for row in await self.bindings(user_id))
        sql = "INSERT INTO bindings (user_id, device_id, is_primary) VALUES (?, ?, ?) RETURNING 0"
        await self._insert(
            f"the binding of device {device_id}", sql, user_id, device_id, int(primary)
        )
        return primary

    async def unbind(self, user_id: int, device_id: int) -> int:
        """Take a device from a user and revoke his tokens for it; how many. Raises NotFound."""
        sql = "DELETE FROM bindings WHERE user_id = ? AND device_id = ? RETURNING 0"
        if not await self._all(sql, user_id, device_id):
            raise NotFound(f"device {device_id} is not bound to user {user_id}")
        sql = (
            "UPDATE tokens SET revoked_at = unixepoch()"
            " WHERE user_id = ? AND device_id = ? AND revoked_at IS NULL RETURNING 0"
        )
        return len(await self._all(sql, user_id, device_id))

    async def set_primary(self, user_id: int, device_id: int) -> None:
        """Make a bound device the user's primary one. Raises NotFound."""
        if device_id not in [row["device_id"] for row in await self.bindings(user_id)]:
            raise NotFound(f"device {device_id} is not bound to user {user_id}")
        await self._all("UPDATE bindings SET is_primary = 0 WHERE user_id = ?", user_id)
        sql = "UPDATE bindings SET is_primary = 1 WHERE user_id = ? AND device_id = ?"
        await self._all(sql, user_id, device_id)

    async def property(self, name: str) -> str | None:
        """A property of the database, such as what it was made for."""
        rows = await self._all("SELECT value FROM properties WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    async def set_property(self, name: str, value: str) -> None:
        await self._all("INSERT OR REPLACE INTO properties VALUES (?, ?)", name, value)

    async def _all(self, sql: str, *values: object) -> list[Any]:
        with _translated(self.path):
            return list(await self._connection.execute_fetchall(sql, values))

    async def _dicts(self, sql: str, *values: object) -> list[dict[str, Any]]:
        with _translated(self.path):
            cursor = await self._connection.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]

    async def _insert(self, what: str, sql: str, *values: object) -> int:
        try:
            rows = list(await self._all(sql, *values))
        except sqlite3.IntegrityError:
            raise Conflict(f"{what} exists already") from None
        return int(rows[0][0])

    async def _id_of(self, table: Literal["users", "devices"], what: str, name_or_id: str) -> int:
        column = "id" if name_or_id.isdecimal() else "name"
        if not name_or_id.isprintable() or (column == "id" and len(name_or_id) > 18):
            raise NotFound(f"no such {what}: {name_or_id}")
        rows = await self._all(f"SELECT id FROM {table} WHERE {column} = ?", name_or_id)
        if not rows:
            raise NotFound(f"no such {what}: {name_or_id}")
        return int(rows[0][0])


@contextlib.asynccontextmanager
async def open_store(path: Path) -> AsyncIterator[Store]:
    """Open a database to read from it, and never create one.

    Raises:
        StoreMissing, StoreForeign, StoreBusy, StoreError: one line with what to do.

    """
    _check_file(path)
    connection = await _connect(path, "rw")
    try:
        with _translated(path):
            await _check_schema(path, connection)
            await connection.execute("PRAGMA query_only = 1")
        yield Store(path, connection)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def open_to_write(path: Path, *, create: bool = False) -> AsyncIterator[Store]:
    """Open a database for one change, which is kept whole or not at all.

    Waits up to LOCK_TIMEOUT seconds for other writers. With ``create``, makes the file and brings
    its schema up to date first.

    Raises:
        StoreMissing, StoreForeign, StoreBusy, StoreError: one line with what to do.

    """
    if create:
        _create_file(path)
    _check_file(path)
    _check_owner(path)
    async with _turn_to_write(path):
        connection = await _connect(path, "rw")
        try:
            with _translated(path):
                if create:
                    await _migrate(path, connection)
                await _check_schema(path, connection)
                await connection.execute("PRAGMA foreign_keys = 1")
                await connection.execute("BEGIN IMMEDIATE")
                yield Store(path, connection)
                await connection.execute("COMMIT")
                await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            await connection.close()


def _create_file(path: Path) -> None:
    if not os.path.lexists(path):
        _check_folder(path.parent)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except PermissionError:
        pass  # it is there and somebody else's, as the next check says better
    except OSError as error:
        raise StoreMissing(f"{path} cannot be created: {error.strerror}") from None


async def _connect(path: Path, mode: str) -> aiosqlite.Connection:
    with _translated(path):
        connection = await aiosqlite.connect(
            f"file:{quote(str(path))}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
        )
        try:
            await connection.execute("PRAGMA wal_autocheckpoint = 0")
        except BaseException:
            await connection.close()
            raise
        return connection


async def _check_schema(path: Path, connection: aiosqlite.Connection) -> None:
    application_id = await _pragma(connection, "application_id")
    version = await _pragma(connection, "user_version")
    if application_id != APPLICATION_ID:
        raise StoreForeign(f"{path} is not a wsgateway database: set auth.database to another file")
    if version > len(MIGRATIONS):
        raise StoreForeign(
            f"{path} was made by a newer wsgateway (schema {version}): upgrade wsgateway"
        )
    if version < len(MIGRATIONS):
        raise StoreForeign(f"{path} has an older schema ({version}): run wsgateway db init")


async def _migrate(path: Path, connection: aiosqlite.Connection) -> None:
    """Bring the schema forward, each version in a transaction of its own."""
    version = await _pragma(connection, "user_version")
    tables = await connection.execute_fetchall("SELECT count(*) FROM sqlite_master")
    is_new = version == 0 and next(iter(tables))[0] == 0
    application_id = await _pragma(connection, "application_id")
    if application_id != APPLICATION_ID and not (is_new and application_id == 0):
        raise StoreForeign(f"{path} is not a wsgateway database: choose another file")
    if version >= len(MIGRATIONS):
        return
    await connection.execute_fetchall("PRAGMA journal_mode = WAL")
    await connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        await connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")


async def _pragma(connection: aiosqlite.Connection, name: str) -> int:
    rows: Iterable[Any] = await connection.execute_fetchall(f"PRAGMA {name}")
    return int(next(iter(rows))[0])


@contextlib.asynccontextmanager
async def _turn_to_write(path: Path) -> AsyncIterator[None]:
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}.lock cannot be written: {error.strerror}") from None
    try:
        for _ in range(int(LOCK_TIMEOUT / 0.05)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(0.05)  # flock() has no time-out; polling paces the wait
        else:
            raise StoreBusy(f"{path} is being written by another command: try again")
        yield
    finally:
        os.close(lock)


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise StoreMissing(
            f"{path}: no token database: run wsgateway db init, or set auth.database"
        ) from None
    except PermissionError:
        raise _not_for_us(path) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be reached: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise StoreForeign(f"{path} is no file and cannot be used: set auth.database")
    if not os.access(path, os.R_OK | os.W_OK):
        raise _not_for_us(path)


def _check_owner(path: Path) -> None:
    """Refuse what would leave files behind that the service cannot write."""
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise StoreForeign(f"{path} belongs to {_run_as(owner)}")


def _check_folder(folder: Path) -> None:
    """Refuse to make, as root, a file that the folder's owner cannot use: root may do it anywhere."""
    with contextlib.suppress(OSError):
        owner = folder.stat().st_uid
        if os.geteuid() == 0 and owner != 0:
            raise StoreForeign(f"{folder} belongs to {_run_as(owner)}")


def _run_as(owner: int) -> str:
    """A user's name, and how to run a command as he."""
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"'#{owner}'"
    return f"{name}: run this as sudo -u {name} wsgateway ..."


def _not_for_us(path: Path) -> StoreForeign:
    """What to do about a file that this user may not read and write, as far as can be seen."""
    for place in (path, path.parent):
        with contextlib.suppress(OSError):
            owner = place.stat().st_uid
            if owner != os.geteuid():
                return StoreForeign(f"{place} belongs to {_run_as(owner)}")
            break
    return StoreForeign(f"{path}: not readable and writable for this user")


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _translated(path: Path) -> Any:
    """SQLite's errors as ours, by what a person can do about them."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or type(error).__name__
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise StoreBusy(f"{path} is locked by another program: try again") from error
        if name.startswith("SQLITE_FULL"):
            raise StoreError(f"{path}: the disk is full: nothing was changed") from error
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            raise StoreForeign(f"{path} is damaged or not an SQLite database") from error
        raise StoreError(f"{path}: {name}: the database cannot be used") from error
    except (UnicodeEncodeError, OverflowError):
        raise StoreError(f"{path}: cannot hold such a text or number") from None
    except ValueError as error:  # what aiosqlite raises once its connection is closed
        raise StoreError(f"{path}: the database is closed") from error
