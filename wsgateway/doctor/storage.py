"""The token database: whose it is, who can read it, and whether it is whole.

Only this module judges the file. All SQL is in `store`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from wsgateway import store
from wsgateway.doctor.finding import Finding, failed, passed, skipped, warned
from wsgateway.errors import StoreBusy, StoreError, StoreMissing
from wsgateway.store import Store

NETWORK: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gfs2",
     "lustre", "nfs", "nfs4", "ocfs2", "smb3"}
)  # fmt: skip
"""File systems on which SQLite's locks and its shared memory do not work."""

COMPANIONS: Final = ("-wal", "-shm", ".lock")
"""Files beside the database that whoever writes it must be able to write."""

MOUNTS = Path("/proc/self/mountinfo")


async def check(path: Path, uid: int | None, seconds: float) -> list[Finding]:
    """Look at the file and into it; ``uid`` is the user that the gateway runs as, where known."""
    try:
        status = await asyncio.to_thread(path.stat)
    except FileNotFoundError:
        fix = "wsgateway db init, or set auth.database"
        return [failed("database", f"{path}: there is no such file", fix)]
    except OSError as error:
        fix = "run this as the gateway's user, or set auth.database"
        return [failed("database", f"{path}: {error.strerror}", fix)]
    return [
        *await _contents(path, seconds),
        _owner(path, status.st_uid, uid),
        _mode(path, status.st_mode),
        _place(path),
    ]


async def _contents(path: Path, seconds: float) -> list[Finding]:
    found = []
    try:
        async with store.open_store(path) as db:
            found.append(passed("database", f"{path}: schema is up to date"))
            found.append(await _journal(path, db))
            found.append(await _whole(path, db, seconds))
    except StoreMissing as error:
        found.append(failed("database", str(error), "wsgateway db init"))
    except StoreBusy as error:
        fix = "find who holds it (fuser -v FILE) and end that"
        found.append(failed("database", str(error), fix))
    except StoreError as error:
        fix = "run this as the gateway's user; if the file is damaged, restore it from a backup"
        found.append(failed("database", str(error), fix))
    return found


async def _journal(path: Path, db: Store) -> Finding:
    mode = await db.journal_mode()
    if mode == "wal":
        return passed("journal", "write-ahead log")
    fix = f"stop the gateway, then sqlite3 {path} 'PRAGMA journal_mode=WAL', then start it"
    what = (
        f"journal mode is {mode}, not wal: every change locks the gateway out while it is written"
    )
    return failed("journal", what, fix)


async def _whole(path: Path, db: Store, seconds: float) -> Finding:
    try:
        async with asyncio.timeout(seconds):
            damage = await db.damage()
    except TimeoutError:
        return skipped("integrity", f"takes longer than {seconds:g} s: try --timeout")
    if damage is None:
        return passed("integrity", "quick_check found nothing")
    fix = f"stop the gateway and restore {path} from a backup"
    return failed("integrity", f"the file is damaged: {damage}", fix)


def _owner(path: Path, owner: int, uid: int | None) -> Finding:
    name = "owner"
    whose, expected = "the database's", owner
    if uid is not None:
        whose, expected = "the gateway's", uid
    elif os.geteuid():
        whose, expected = "yours", os.geteuid()
    for file, status in _files(path):
        theirs = status.st_uid
        if theirs != expected:
            fix = f"chown {expected} {file}; run commands as sudo -u '#{expected}' wsgateway ..."
            return failed(name, f"{file} is user {theirs}'s, and {whose} is {expected}", fix)
    return passed(name, f"user {owner}")


def _mode(path: Path, mode: int) -> Finding:
    name = "permissions"
    for file, status in _files(path):
        bits = stat.S_IMODE(status.st_mode)
        if bits & 0o077:
            what = f"{file} has mode {bits:04o}: others can read who may connect, or change it"
            return failed(name, what, f"chmod 600 {file}")
    folder = path.parent
    bits = stat.S_IMODE(folder.stat().st_mode)
    if bits & 0o027:
        what = f"{folder} has mode {bits:04o}: others can look in, or replace the database"
        return warned(name, what, f"chmod 700 {folder} (StateDirectoryMode=0700 in the unit)")
    return passed(name, f"file {stat.S_IMODE(mode):04o}, folder {bits:04o}")


def _files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The database and those of its companions that are there, which come and go."""
    for ending in ("", *COMPANIONS):
        file = Path(f"{path}{ending}")
        with contextlib.suppress(FileNotFoundError):
            yield file, file.stat()


def _place(path: Path) -> Finding:
    name = "file system"
    try:
        kind = file_system(str(path.resolve()), MOUNTS.read_text())
    except OSError:
        return skipped(name, "this system does not say where the file is kept")
    if kind in NETWORK:
        fix = "move it to a local disk; each host has a database of its own"
        return warned(name, f"{path} is on {kind}, where SQLite's locks do not work", fix)
    return passed(name, kind or "unknown")


def file_system(path: str, mounts: str) -> str:
    """The kind of file system a path is on, by the kernel's table of mounts (proc(5))."""
    best, found = "", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 5 or not after:
            continue
        place = words[4].replace("\\040", " ").rstrip("/")
        # The last of several mounts on one place hides the others.
        if (path + "/").startswith(place + "/") and len(place) >= len(best):
            best, found = place, after.split()[0]
    return found
