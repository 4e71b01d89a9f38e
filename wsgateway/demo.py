"""The embedded default: a database of its own with one user, one device and one token.

Only this module knows the demo. It refuses every database that it did not create.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from wsgateway import auth, store
from wsgateway.config import Config
from wsgateway.errors import StoreForeign, StoreMissing
from wsgateway.store import Scope, Store

PROPERTY = "demo"


class Demo(NamedTuple):
    """What a demo starts with: ``key`` is for its HTTP API."""

    config: Config
    token: str
    key: str


async def prepare(config: Config) -> Demo:
    """A demo: loopback, a database of its own, a device's token and a key.

    Both are kept in files that only their owner can read, so that they are the same at every start.

    Raises:
        StoreError: the demo's database cannot be used.

    """
    folder, database = config.state_dir(), _database(config)
    files: dict[Scope, Path] = {"device": folder / "demo.token", "admin": folder / "demo.key"}
    wanted = {scope: _read_token(path) for scope, path in files.items()}
    tokens = await _prepare_database(database, wanted)
    for scope, path in files.items():
        _keep_token(path, tokens[scope])
    return Demo(confined(config), tokens["device"], tokens["admin"])


def confined(config: Config) -> Config:
    """A configuration on loopback, with the demo's database."""
    return msgspec.structs.replace(
        config,
        server=msgspec.structs.replace(config.server, host="127.0.0.1"),
        api=msgspec.structs.replace(config.api, host="127.0.0.1"),
        auth=msgspec.structs.replace(config.auth, database=str(_database(config))),
    )


def _database(config: Config) -> Path:
    return config.state_dir() / "demo.db"


async def _prepare_database(database: Path, tokens: dict[Scope, str]) -> dict[Scope, str]:
    try:
        await _refuse_foreign(database)
        new = False
    except StoreMissing:
        new = True
    async with store.open_to_write(database, create=True) as db:
        if new:
            await db.set_property(PROPERTY, "1")
            user_id = await db.add_user("demo")
            await db.bind(user_id, await db.add_device("demo-speaker"))
        return {scope: await _valid(db, scope, token) for scope, token in tokens.items()}


async def _valid(db: Store, scope: Scope, token: str) -> str:
    """The token, or a new one where it was revoked."""
    known = await db.tokens_by_hash([auth.hash_token(token)])
    for row in known.values():
        if not auth.ended(row, time.time(), (scope,)):
            return token
        token = auth.new_token()
    user_id = await db.user_id("demo")
    await db.add_token(auth.hash_token(token), user_id, scope, label="demo")
    return token


async def _refuse_foreign(database: Path) -> None:
    try:
        async with store.open_store(database) as db:
            ours = await db.property(PROPERTY) == "1"
    except StoreForeign:
        ours = False
    if not ours:
        raise StoreForeign(
            f"{database} was not made by --demo: move it away, or set runtime.state_dir"
        )


def _read_token(path: Path) -> str:
    """The token that is kept, or a new one where none can be read."""
    try:
        return path.read_text("ascii").strip() or auth.new_token()
    except FileNotFoundError:
        return auth.new_token()
    except (OSError, UnicodeDecodeError):
        raise StoreForeign(f"{path} does not hold a token: remove it") from None


def _keep_token(path: Path, token: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - with a mode
        os.fchmod(file.fileno(), 0o600)
        file.write(token + "\n")
