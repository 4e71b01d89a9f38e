"""The database file: what is refused, what is kept, what each question answers.

Real SQLite files; other programs are connections of the standard library's sqlite3.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Accounts, eventually
from wsgateway import auth, store
from wsgateway.errors import (
    Conflict,
    GatewayError,
    NotFound,
    StoreBusy,
    StoreError,
    StoreForeign,
    StoreMissing,
)
from wsgateway.store import open_store, open_to_write

HASH = "ab" * 32


@contextlib.contextmanager
def other_program(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def pragma(path: Path, name: str) -> object:
    with other_program(path) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def schema(path: Path) -> set[str]:
    with other_program(path) as connection:
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {" ".join(row[0].split()) for row in rows}


async def make(path: Path) -> None:
    async with open_to_write(path, create=True):
        pass


# Files.


async def test_a_new_database_is_ours_current_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "w.db"
    await make(path)
    assert pragma(path, "application_id") == store.APPLICATION_ID
    assert pragma(path, "user_version") == len(store.MIGRATIONS)
    assert pragma(path, "journal_mode") == "wal"
    assert pragma(path, "integrity_check") == "ok"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("version", range(len(store.MIGRATIONS) + 1))
async def test_every_older_schema_comes_forward_and_keeps_what_it_holds(
    tmp_path: Path, version: int
) -> None:
    fresh, old = tmp_path / "fresh.db", tmp_path / "old.db"
    await make(fresh)
    with other_program(old) as connection:
        connection.execute(f"PRAGMA application_id = {store.APPLICATION_ID}")
        for script in store.MIGRATIONS[:version]:
            connection.executescript(script)
        connection.execute(f"PRAGMA user_version = {version}")
        if version:
            connection.execute("INSERT INTO users (id, name) VALUES (7, 'grandma')")
    if version < len(store.MIGRATIONS):
        for opening in (open_store(old), open_to_write(old)):
            with pytest.raises(
                StoreForeign, match=rf"older schema \({version}\): run wsgateway db"
            ):
                await opening.__aenter__()
    await make(old)
    assert schema(old) == schema(fresh)
    assert pragma(old, "user_version") == len(store.MIGRATIONS)
    async with open_store(old) as db:
        assert [user["name"] for user in await db.users()] == (["grandma"] if version else [])


async def test_an_empty_file_becomes_a_database_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "w.db"
    path.touch()
    for opening in (open_store(path), open_to_write(path)):
        with pytest.raises(StoreForeign, match="is not a wsgateway database"):
            await opening.__aenter__()
        assert path.read_bytes() == b""
    await make(path)
    async with open_store(path) as db:
        assert await db.users() == []


async def test_making_it_again_changes_nothing(accounts: Accounts) -> None:
    await make(accounts.path)
    async with open_store(accounts.path) as db:
        assert [user["name"] for user in await db.users()] == ["alice"]


def _foreign(version: int, application: int = 0, mode: str = "DELETE") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with other_program(path) as connection:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            connection.execute("CREATE TABLE bookmarks (url TEXT)")
            connection.execute("INSERT INTO bookmarks VALUES ('https://example.org')")
            connection.execute(f"PRAGMA user_version = {version}")
            connection.execute(f"PRAGMA application_id = {application}")

    return write


def _newer(path: Path) -> None:
    asyncio.run(make(path))
    with other_program(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(store.MIGRATIONS) + 1}")


def _damaged(path: Path) -> None:
    asyncio.run(make(path))
    path.write_bytes(b"SQLite format 3\0" + os.urandom(8176))


OTHER = r"is not a wsgateway database|holds another program's tables"
DAMAGED = "is damaged or not an SQLite database"
REFUSED = {
    "another program's": (_foreign(0), OTHER),
    "another program's of version 1": (_foreign(1), OTHER),
    "another program's of version 77": (_foreign(77), OTHER),
    "another program's with an id": (_foreign(3, 0x42), OTHER),
    "another program's in WAL mode": (_foreign(1, mode="WAL"), OTHER),
    "of a newer wsgateway": (_newer, r"was made by a newer wsgateway \(schema 2\): upgrade"),
    "a text": (lambda path: path.write_text("hello\n" * 1000), DAMAGED),
    "a short text": (lambda path: path.write_text("hello\n"), DAMAGED),
    "damaged": (_damaged, DAMAGED),
    "a folder": (lambda path: path.mkdir(), "cannot be|is not a file"),
}
OPENINGS: dict[str, Callable[[Path], contextlib.AbstractAsyncContextManager[store.Store]]] = {
    "to read": open_store,
    "to write": open_to_write,
    "to create": lambda path: open_to_write(path, create=True),
}


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(
    tmp_path: Path, kind: str, opening: str
) -> None:
    path = tmp_path / "w.db"
    make_file, sentence = REFUSED[kind]
    make_file(path)
    before = path.read_bytes() if path.is_file() else None

    async def open_it() -> None:
        async with OPENINGS[opening](path):
            raise AssertionError("it was opened")

    with pytest.raises(StoreError, match=sentence) as caught:
        asyncio.run(open_it())
    assert len(str(caught.value).splitlines()) == 1
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("opening", ["to read", "to write"])
async def test_a_missing_file_is_not_created(tmp_path: Path, opening: str) -> None:
    for path in (tmp_path / "w.db", tmp_path / "no" / "folder" / "w.db"):
        with pytest.raises(StoreMissing, match="run wsgateway db init") as caught:
            await OPENINGS[opening](path).__aenter__()
        assert caught.value.exit_code == 78
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/w.db", "file/more/w.db", "dangling/w.db", "loop"])
async def test_a_place_where_no_file_can_be_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for opening in OPENINGS.values():
        with pytest.raises(GatewayError) as caught:
            await opening(tmp_path / name).__aenter__()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["with space.db", "100%25.db", "a?mode=rwc&b#c.db", "名前.db"])
async def test_any_file_name_is_that_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    await make(path)
    async with open_to_write(path) as db:
        await db.add_user("alice")
    async with open_store(path) as db:
        assert len(await db.users()) == 1
    assert {each.name for each in tmp_path.iterdir()} == {name, f"{name}.lock"}


@pytest.mark.faults
async def test_root_does_not_leave_files_behind_that_the_owner_cannot_write(
    accounts: Accounts,
) -> None:
    for owner, name in ((65533, "'#65533'"), (pwd.getpwnam("daemon").pw_uid, "daemon")):
        os.chown(accounts.path, owner, owner)
        with pytest.raises(StoreForeign, match=f"run this as sudo -u {name} wsgateway") as caught:
            await open_to_write(accounts.path).__aenter__()
        assert caught.value.exit_code == 78
    async with open_store(accounts.path) as db:
        assert len(await db.users()) == 1


@pytest.mark.faults
async def test_root_makes_no_database_in_the_folder_of_somebody_else(tmp_path: Path) -> None:
    os.chown(tmp_path, 65533, 65533)
    with pytest.raises(StoreForeign, match="belongs to '#65533': run this as sudo -u '#65533' wsg"):
        await open_to_write(tmp_path / "w.db", create=True).__aenter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("mode", "opening", "sentence"),
    [
        (0o600, "open_to_write(path)", "belongs to root: run this as sudo -u root wsgateway"),
        (0o644, "open_store(path)", "belongs to root: run this as sudo -u root wsgateway"),
        (0o666, "open_to_write(path)", "belongs to"),
        (0o700, "open_store(path / 'w.db')", "w.db belongs to root: run this as sudo -u root"),
        (0o700, "open_to_write(path / 'w.db')", "w.db belongs to root: run this as sudo -u root"),
        (0o700, "open_to_write(path / 'w.db', create=True)", "belongs to root: run this as sudo"),
    ],
)
def test_a_user_who_may_not_is_told_so_in_one_line(mode: int, opening: str, sentence: str) -> None:
    program = f"""
import asyncio, os, pathlib, sys
from wsgateway import errors, store
path = pathlib.Path(sys.argv[1])
async def refused(opening):
    try:
        await opening.__aenter__()
    except errors.StoreError as error:
        print(error)
os.setgroups([]), os.setgid(65534), os.setuid(65534)
asyncio.run(refused(store.{opening}))
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder) / "w.db"
        if mode == 0o700:
            path.mkdir()
        else:
            asyncio.run(make(path))
        path.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=30
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(sentence, done.stdout)
    assert len(done.stdout.splitlines()) == 1


# Locks.


async def test_a_database_that_another_program_holds_is_busy_and_then_is_not(
    accounts: Accounts,
) -> None:
    with other_program(accounts.path) as other:
        assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
        other.execute("BEGIN EXCLUSIVE")
        for opening in (open_store(accounts.path), open_to_write(accounts.path)):
            with pytest.raises(StoreBusy, match="locked by another program: try again") as caught:
                await opening.__aenter__()
            assert caught.value.exit_code == 3
        other.execute("COMMIT")
    async with open_store(accounts.path) as db:
        assert len(await db.users()) == 1


async def test_who_reads_is_not_held_up_by_who_writes_and_sees_whole_changes_only(
    accounts: Accounts,
) -> None:
    async with open_store(accounts.path) as reader:
        before = await reader.change_count()
        async with open_to_write(accounts.path) as writer:
            await writer.add_user("bob")
            assert len(await reader.users()) == 1
            assert await reader.change_count() == before
        assert len(await reader.users()) == 2
        assert await reader.change_count() != before
        assert await reader.change_count() == await reader.change_count()


async def test_writers_take_turns(accounts: Accounts) -> None:
    async def add(number: int) -> None:
        async with open_to_write(accounts.path) as db:
            await db.add_user(f"user-{number}")

    await asyncio.gather(*map(add, range(10)))
    async with open_store(accounts.path) as db:
        assert {user["name"] for user in await db.users()} >= {f"user-{n}" for n in range(10)}


def test_a_writer_that_does_not_get_its_turn_gives_up(tmp_path: Path) -> None:
    async def wait_in_vain() -> None:
        path = tmp_path / "w.db"
        await make(path)
        async with open_to_write(path):
            with pytest.raises(StoreBusy, match="is being written by another command: try again"):
                await open_to_write(path).__aenter__()

    asyncio.run(wait_in_vain())


async def test_a_change_that_fails_is_not_kept(accounts: Accounts) -> None:
    change = open_to_write(accounts.path)
    db = await change.__aenter__()
    await db.add_user("bob")
    failure = RuntimeError()
    assert not await change.__aexit__(RuntimeError, failure, None)
    async with open_store(accounts.path) as db:
        assert [user["name"] for user in await db.users()] == ["alice"]


async def test_who_reads_cannot_write(accounts: Accounts) -> None:
    async with open_store(accounts.path) as db:
        with pytest.raises(StoreError):
            await db.add_user("bob")


async def test_a_closed_database_says_so(accounts: Accounts) -> None:
    async with open_store(accounts.path) as db:
        pass
    with pytest.raises(StoreError, match="the database is closed"):
        await db.users()


async def test_it_is_noticed_when_the_path_no_longer_names_the_open_file(
    accounts: Accounts, tmp_path: Path
) -> None:
    async with open_store(accounts.path) as db:
        assert db.intact()
        accounts.path.rename(tmp_path / "away.db")
        await eventually(lambda: not db.intact())
        (tmp_path / "away.db").rename(accounts.path)
        await eventually(db.intact)
        await make(tmp_path / "other.db")
        (tmp_path / "other.db").rename(accounts.path)
        await eventually(lambda: not db.intact())


# Users and devices.


async def test_users(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        assert await db.add_user("bob", 4711) == 4711
        assert await db.add_user("carol") == 4712
        for name, number in (("bob", None), ("dave", 4711)):
            with pytest.raises(Conflict, match=f"user '{name}' exists already"):
                await db.add_user(name, number)
        assert [await db.user_id(word) for word in ("alice", "1", "bob", "4711")] == [
            1,
            1,
            4711,
            4711,
        ]
        for stranger in ("dave", "5", "9" * 30, "", "-1", "' OR 1=1 --", "\udcff"):
            with pytest.raises(NotFound, match="no such user: "):
                await db.user_id(stranger)
        await db.set_active(4711, False)
        now = 1
        for token_hash, expires_at in (("aa" * 32, None), ("bb" * 32, now), ("cc" * 32, 2**40)):
            await db.add_token(token_hash, 4711, "device", expires_at=expires_at)
        await db.add_token("dd" * 32, 4711, "device")
        await db.revoke("hash", "dd" * 32)
        assert await db.users() == [
            {"id": 1, "name": "alice", "active": 1, "tokens": 1},
            {"id": 4711, "name": "bob", "active": 0, "tokens": 2},
            {"id": 4712, "name": "carol", "active": 1, "tokens": 0},
        ]
        await db.set_active(4711, True)
        assert (await db.users())[1]["active"] == 1


async def test_devices_and_the_one_primary_of_each_user(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        bob = await db.add_user("bob")
        porch, toy = await db.add_device("porch"), await db.add_device("toy", 17)
        assert (porch, toy) == (2, 17)
        with pytest.raises(Conflict, match="device 'toy' exists already"):
            await db.add_device("toy")
        assert [await db.device_id(word) for word in ("toy", "17")] == [17, 17]
        with pytest.raises(NotFound, match="no such device: attic"):
            await db.device_id("attic")
        assert await db.bind(bob, porch) is True
        assert await db.bind(bob, toy) is False
        assert await db.bind(1, porch) is False  # alice has her speaker
        with pytest.raises(Conflict, match="the binding of device 2 exists already"):
            await db.bind(bob, porch)
        assert await db.devices() == [
            {"id": 1, "name": "speaker", "users": [1], "primary_of": [1]},
            {"id": 2, "name": "porch", "users": [1, 2], "primary_of": [2]},
            {"id": 17, "name": "toy", "users": [2], "primary_of": []},
        ]
        await db.set_primary(bob, toy)
        await db.set_primary(bob, toy)
        assert await db.bindings(bob) == [
            {"device_id": 2, "is_primary": 0},
            {"device_id": 17, "is_primary": 1},
        ]
        assert (await db.bindings(1))[0] == {"device_id": 1, "is_primary": 1}
        for verb in (db.set_primary, db.unbind):
            with pytest.raises(NotFound, match="device 1 is not bound to user 2"):
                await verb(bob, 1)
        await db.unbind(bob, toy)
        assert not any(row["is_primary"] for row in await db.bindings(bob))
        assert await db.bind(bob, toy) is True


async def test_no_program_can_give_a_user_two_primary_devices(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        await db.bind(1, await db.add_device("porch"))
    with pytest.raises(sqlite3.IntegrityError):
        accounts.execute("UPDATE bindings SET is_primary = 1")


async def test_unbinding_revokes_the_tokens_of_that_user_for_that_device_alone(
    accounts: Accounts,
) -> None:
    async with open_to_write(accounts.path) as db:
        bob, porch = await db.add_user("bob"), await db.add_device("porch")
        for user in (1, bob):
            await db.bind(user, porch)
        hit = await db.add_token("aa" * 32, 1, "device", device_id=porch)
        early = await db.add_token("bb" * 32, 1, "device", device_id=porch)
        for number, user, device in (("cc", 1, 1), ("dd", 1, None), ("ee", bob, porch)):
            await db.add_token(number * 32, user, "device", device_id=device)
        await db.revoke("id", early)
        assert await db.unbind(1, porch) == 1
        revoked = [row.id for row in await db.tokens() if row.revoked_at is not None]
        assert revoked == [hit, early]
        assert [row["device_id"] for row in await db.bindings(1)] == [1]


# Tokens.


async def test_a_token_comes_with_its_owner_and_device(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        porch = await db.add_device("porch")
        await db.bind(1, porch)
        bound = await db.add_token(
            "aa" * 32, 1, "device", device_id=porch, label="the porch", expires_at=2**33
        )
        lonely = await db.add_token("bb" * 32, await db.add_user("bob"), "api")
        rows = await db.tokens_by_hash(["aa" * 32, "bb" * 32, HASH, "'"])
        assert set(rows) == {"aa" * 32, "bb" * 32}
        row = rows["aa" * 32]
        assert (row.hash, row.user_id, row.user_name, row.user_active) == ("aa" * 32, 1, "alice", 1)
        assert (row.device_id, row.scope, row.label) == (porch, "device", "the porch")
        assert (row.expires_at, row.revoked_at) == (2**33, None)
        assert row.created_at > 1_700_000_000
        assert (rows["bb" * 32].device_id, rows["bb" * 32].scope) == (None, "api")
        assert (await db.tokens(1))[0].device_id == 1, "the user's primary device"
        await db.set_primary(1, porch)
        assert (await db.tokens(1))[0].device_id == porch
        assert [row.id for row in await db.tokens()] == [1, bound, lonely]
        assert (await db.tokens())[1:] == list(rows.values())
        assert [row.id for row in await db.tokens(1)] == [1, bound]
        assert await db.tokens(999) == []
        assert await db.tokens_by_hash([]) == {}


async def test_a_token_that_cannot_be_is_not_stored(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        await db.add_device("porch")
        for device in (2, 999):
            with pytest.raises(NotFound, match=f"device {device} is not bound to user 1"):
                await db.add_token(HASH, 1, "device", device_id=device)
        await db.add_token(HASH, 1, "device")
        with pytest.raises(Conflict, match="the token exists already"):
            await db.add_token(HASH, 1, "device")
        for values in (("short", 1, "device"), ("cd" * 32, 1, "root"), ("cd" * 32, 999, "device")):
            with pytest.raises(Conflict):
                await db.add_token(*values)


async def test_revoking_twice_keeps_the_first_time(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        await db.add_token(HASH, 1, "device")
        first = await db.revoke("hash", HASH)
        assert first.revoked_at is not None
    accounts.execute("UPDATE tokens SET revoked_at = revoked_at - 60 WHERE hash = ?", HASH)
    async with open_to_write(accounts.path) as db:
        assert (await db.revoke("id", first.id)).revoked_at == first.revoked_at - 60
        for column, value in (("id", 999), ("hash", "00" * 32)):
            with pytest.raises(NotFound, match="no such token"):
                await db.revoke(column, value)  # type: ignore[arg-type]
        assert (await db.tokens())[0].revoked_at is None


async def test_a_thousand_tokens_are_found_at_once(accounts: Accounts) -> None:
    hashes = [f"{number:064x}" for number in range(1000)]
    async with open_to_write(accounts.path) as db:
        ids = [await db.add_token(each, 1, "device") for each in hashes]
    async with open_store(accounts.path) as db:
        rows = await db.tokens_by_hash(hashes)
    assert {row.hash: row.id for row in rows.values()} == dict(zip(hashes, ids, strict=True))


async def test_properties(accounts: Accounts) -> None:
    async with open_to_write(accounts.path) as db:
        assert await db.property("demo") is None
        await db.set_property("demo", "1")
        await db.set_property("demo", "2")
        assert await db.property("demo") == "2"


async def test_no_file_holds_the_text_of_a_token(accounts: Accounts, tmp_path: Path) -> None:
    async with open_store(accounts.path):  # which keeps the write-ahead log in place
        token = await accounts.add_token(label="kitchen")
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert {"wsgateway.db", "wsgateway.db-wal"} <= set(files)
        content = b"".join(files.values())
    assert auth.hash_token(token).encode() in content
    for secret in (token, accounts.token):
        assert re.fullmatch(r"wsg_[\w-]{43}", secret)
        assert secret.removeprefix("wsg_").encode() not in content
