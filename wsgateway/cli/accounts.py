"""`wsgateway db|user|device|token ...`: what changes the token database.

A running gateway notices each change within 5 s and cuts whom it concerns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps

from wsgateway import auth, config, store
from wsgateway.accounts import iso_time, public
from wsgateway.cli import output, settings
from wsgateway.errors import EXIT_CRASH, UsageError
from wsgateway.store import Store

MAX_LINE = 1024
"""Bytes of a line that a token is read from."""

Command = Callable[[argparse.Namespace], int | None]


def _blocking(
    command: Callable[[argparse.Namespace], Awaitable[int | None]],
) -> Command:
    @wraps(command)
    def run(arguments: argparse.Namespace) -> int | None:
        async def main() -> int | None:
            return await command(arguments)

        return asyncio.run(main())

    return run


@_blocking
async def db_init(arguments: argparse.Namespace) -> None:
    """Create the database, or bring its schema up to date."""
    path = settings.load(arguments).config.database()
    existed = path.exists()
    async with store.open_to_write(path, create=True):
        pass
    print(f"{path}: {'up to date' if existed else 'created'}")


@_blocking
async def user_add(arguments: argparse.Namespace) -> None:
    name = _name(arguments.name)
    async with _writing(arguments) as db:
        user_id = await db.add_user(name, arguments.id)
    output.tell(arguments, {"id": user_id, "name": name}, user_id, f"user {user_id} added")


@_blocking
async def user_list(arguments: argparse.Namespace) -> None:
    async with _reading(arguments) as db:
        rows = await db.users()
    for row in rows:
        row["active"] = bool(row["active"])
    output.rows(arguments, ("id", "name", "active", "tokens"), rows)


@_blocking
async def user_enable(arguments: argparse.Namespace) -> None:
    await _set_active(arguments, True)


@_blocking
async def user_disable(arguments: argparse.Namespace) -> None:
    await _set_active(arguments, False)


async def _set_active(arguments: argparse.Namespace, active: bool) -> None:
    async with _writing(arguments) as db:
        user_id = await db.user_id(arguments.user)
        await db.set_active(user_id, active)
    word = "enabled" if active else "disabled"
    output.tell(arguments, {"id": user_id, "active": active}, user_id, f"user {user_id} {word}")


@_blocking
async def device_add(arguments: argparse.Namespace) -> None:
    name = _name(arguments.name)
    async with _writing(arguments) as db:
        user_id = await db.user_id(arguments.user) if arguments.user else None
        device_id = await db.add_device(name, arguments.id)
        if user_id is not None:
            await db.bind(user_id, device_id)
    row = {"id": device_id, "name": name, "user_id": user_id}
    output.tell(arguments, row, device_id, f"device {device_id} added")


@_blocking
async def device_list(arguments: argparse.Namespace) -> None:
    async with _reading(arguments) as db:
        rows = await db.devices()
    output.rows(arguments, ("id", "name", "users", "primary_of"), rows)


@_blocking
async def device_bind(arguments: argparse.Namespace) -> None:
    async with _writing(arguments) as db:
        user_id, device_id = await _pair(db, arguments)
        primary = await db.bind(user_id, device_id)
    row = {"user_id": user_id, "device_id": device_id, "primary": primary}
    output.tell(arguments, row, device_id, f"device {device_id} bound to user {user_id}")


@_blocking
async def device_unbind(arguments: argparse.Namespace) -> None:
    async with _writing(arguments) as db:
        user_id, device_id = await _pair(db, arguments)
        revoked = await db.unbind(user_id, device_id)
    row = {"user_id": user_id, "device_id": device_id, "tokens_revoked": revoked}
    text = f"device {device_id} taken from user {user_id}, {revoked} tokens revoked"
    output.tell(arguments, row, device_id, text)


@_blocking
async def device_primary(arguments: argparse.Namespace) -> None:
    async with _writing(arguments) as db:
        user_id, device_id = await _pair(db, arguments)
        await db.set_primary(user_id, device_id)
    row = {"user_id": user_id, "device_id": device_id}
    output.tell(
        arguments, row, device_id, f"device {device_id} is the primary device of user {user_id}"
    )


@_blocking
async def token_create(arguments: argparse.Namespace) -> None:
    expires_at = _expiry(arguments.expires)
    token = auth.new_token()
    async with _writing(arguments) as db:
        user_id = await db.user_id(arguments.user)
        device_id = await db.device_id(arguments.device) if arguments.device else None
        token_id = await db.add_token(
            auth.hash_token(token),
            user_id,
            arguments.scope,
            device_id=device_id,
            label=arguments.label[:100],
            expires_at=expires_at,
        )
    row = {
        "id": token_id,
        "token": token,
        "user_id": user_id,
        "device_id": device_id,
        "scope": arguments.scope,
        "expires_at": iso_time(expires_at),
    }
    output.tell(arguments, row, token, f"token {token_id} (shown only now):\n{token}")


@_blocking
async def token_list(arguments: argparse.Namespace) -> None:
    async with _reading(arguments) as db:
        user_id = await db.user_id(arguments.user) if arguments.user else None
        rows = [public(row) for row in await db.tokens(user_id)]
    columns = ("id", "user_id", "user_name", "device_id", "scope", "label", "expires_at", "state")
    output.rows(arguments, columns, rows)


@_blocking
async def token_revoke(arguments: argparse.Namespace) -> None:
    given = _read_token(arguments.token)
    async with _writing(arguments) as db:
        if given.isdecimal() and len(given) < 19:
            row = await db.revoke("id", int(given))
        else:
            row = await db.revoke("hash", auth.hash_token(given))
    text = f"token {row.id} revoked; its devices are cut within 5 s"
    output.tell(arguments, {"id": row.id, "user_id": row.user_id}, row.id, text)


@_blocking
async def token_check(arguments: argparse.Namespace) -> int | None:
    token_hash = auth.hash_token(_read_token(arguments.token))
    async with _reading(arguments) as db:
        row = (await db.tokens_by_hash([token_hash])).get(token_hash)
    reason = auth.ended(row, time.time())
    answer = {"valid": reason is None, "reason": reason} | (public(row) if row else {})
    text = "valid" if reason is None else f"not valid for devices: {reason}"
    output.tell(arguments, answer, text, text)
    return None if reason is None else EXIT_CRASH


@contextlib.asynccontextmanager
async def _writing(arguments: argparse.Namespace) -> AsyncIterator[Store]:
    async with store.open_to_write(settings.load(arguments).config.database()) as db:
        yield db


@contextlib.asynccontextmanager
async def _reading(arguments: argparse.Namespace) -> AsyncIterator[Store]:
    async with store.open_store(settings.load(arguments).config.database()) as db:
        yield db


async def _pair(db: Store, arguments: argparse.Namespace) -> tuple[int, int]:
    return await db.user_id(arguments.user), await db.device_id(arguments.device)


def _name(name: str) -> str:
    if name.isdecimal() or not name.isprintable() or not 0 < len(name) <= 150:
        raise UsageError(
            f"{name[:50]!r}: a name has 1 to 150 printable characters and is not only digits "
            "(digits mean an id)"
        )
    return name


def _expiry(duration: str | None) -> int | None:
    if duration is None:
        return None
    try:
        seconds = config.parse_duration(duration)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 100 * 365 * 86400:
        raise UsageError(f'--expires {duration}: write a duration such as "90d" or "12h"')
    return int(time.time() + seconds)


def _read_token(given: str) -> str:
    token = given
    if given == "-":
        line = sys.stdin.buffer.readline(MAX_LINE) if sys.stdin else b""
        token = line.decode(errors="replace").strip()
    if not token:
        raise UsageError("no token given")
    return token
