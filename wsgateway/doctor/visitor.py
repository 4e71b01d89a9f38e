"""A user of the doctor's own, who is gone when it has looked.

Only this module makes and removes it.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from wsgateway import auth, store
from wsgateway.store import Scope

NAME = "wsgateway-doctor"
"""Begins his name, should one have to be removed by hand."""


class Visitor(NamedTuple):
    """Tokens of a user who has no device: one that opens the device socket, one for the HTTP API."""

    token: str
    key: str


@contextlib.asynccontextmanager
async def staying(database: Path, seconds: float) -> AsyncIterator[Visitor]:
    """A visitor while inside. His tokens end after ``seconds`` also if we are killed.

    Raises:
        StoreError: the database cannot be written; one line with what to do.

    """
    tokens: dict[Scope, str] = {"device": auth.new_token(), "api": auth.new_token()}
    async with store.open_to_write(database) as db:
        user_id = await db.add_user(f"{NAME}-{secrets.token_hex(4)}")
        for scope, token in tokens.items():
            expires_at = int(time.time() + seconds)
            await db.add_token(
                auth.hash_token(token), user_id, scope, label="doctor", expires_at=expires_at
            )
    try:
        yield Visitor(tokens["device"], tokens["api"])
    finally:
        async with store.open_to_write(database) as db:
            await db.remove_user(user_id)
