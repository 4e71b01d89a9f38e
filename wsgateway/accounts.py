"""What a running gateway changes in the database, and what it looks up besides device tokens.

Only this module opens the database to write while devices are served. It knows neither HTTP nor
sockets. Each change is a transaction of its own, under the same lock as the commands'.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from wsgateway import store
from wsgateway.auth import Authenticator, ended, hash_token, new_token
from wsgateway.errors import NotFound, StoreError
from wsgateway.store import Scope, TokenRow

MAX_KNOWN: Final = 100_000
"""Users and devices remembered to exist, about 10 MB, until the database changes."""


class Accounts:
    """Users, devices and tokens, as the HTTP API and other instances change them."""

    def __init__(self, path: Path, authenticator: Authenticator) -> None:
        self._path = path
        self._authenticator = authenticator
        self._known: OrderedDict[tuple[str, int], bool] = OrderedDict()
        self._known_since = -1

    async def exists(self, kind: Literal["user", "device"], number: int) -> bool:
        """Whether there is such a user or device; True where the database cannot say."""
        if self._known_since != self._authenticator.changes_noticed:
            self._known_since = self._authenticator.changes_noticed
            self._known.clear()
        answer = self._known.get((kind, number))
        if answer is None:
            try:
                answer = await self._authenticator.exists(kind, number)
            except StoreError:
                return True
            self._known[kind, number] = answer
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return answer

    async def tokens(self, user_id: int | None, after: int, limit: int) -> list[dict[str, Any]]:
        """Tokens by id, without their text; those after an id."""
        async with store.open_store(self._path) as db:
            return [public(row) for row in await db.tokens(user_id, after=after, limit=limit)]

    async def create_token(
        self,
        user_id: int,
        scope: Scope,
        device_id: int | None,
        label: str,
        expires_at: int | None,
    ) -> tuple[int, str]:
        """Create a token; its id and its text, which is shown only now. Raises NotFound."""
        token = new_token()
        async with store.open_to_write(self._path) as db:
            if not await db.exists("user", user_id):
                raise NotFound(f"no such user: {user_id}")
            token_id = await db.add_token(
                hash_token(token),
                user_id,
                scope,
                device_id=device_id,
                label=label,
                expires_at=expires_at,
            )
        self._authenticator.forget()
        return token_id, token

    async def token_hash(self, token_id: int) -> str:
        """The hash of a token. Raises NotFound."""
        async with store.open_store(self._path) as db:
            for row in await db.tokens(after=token_id - 1, limit=1):
                if row.id == token_id:
                    return row.hash
        raise NotFound(f"no such token: {token_id}")

    async def revoke(self, token_hash: str) -> None:
        """End a token, if it is known here."""
        with contextlib.suppress(NotFound):
            async with store.open_to_write(self._path) as db:
                await db.revoke("hash", token_hash)
        self._authenticator.forget()

    async def set_active(self, user_id: int, active: bool) -> None:
        """Enable or disable a user."""
        async with store.open_to_write(self._path) as db:
            await db.set_active(user_id, active)
        self._authenticator.forget()


def public(row: TokenRow) -> dict[str, Any]:
    """What may be told of a token. Times are ISO 8601, UTC."""
    return {
        "id": row.id,
        "user_id": row.user_id,
        "user_name": row.user_name,
        "device_id": row.device_id,
        "scope": row.scope,
        "label": row.label,
        "created_at": iso_time(row.created_at),
        "expires_at": iso_time(row.expires_at),
        "state": ended(row, time.time(), (row.scope,)) or "valid",
    }


def iso_time(seconds: int | None) -> str | None:
    """Seconds since 1970 as ISO 8601, UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
