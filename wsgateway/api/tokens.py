"""Calls about tokens: list, create, revoke."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from wsgateway.accounts import iso_time
from wsgateway.api import answers
from wsgateway.api.context import Api
from wsgateway.api.people import Cursor, Identifier, Limit, make_cursor, read_cursor
from wsgateway.api.routes import Call, NoQuery, route


class TokensPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which page of the tokens of whom."""

    limit: Limit = 100
    cursor: Cursor = None
    user_id: Identifier = None


class NewToken(msgspec.Struct, frozen=True):
    """A token to be created."""

    user_id: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    scope: Literal["device", "api", "admin"] = "device"
    device_id: Identifier = None
    label: Annotated[str, Meta(max_length=100, description="For people.")] = ""
    expires_in: (
        Annotated[int, Meta(ge=1, le=100 * 365 * 86400, description="Seconds until it expires.")]
        | None
    ) = None


@route("GET", "/api/tokens", answer=answers.Tokens, scope="admin", query=TokensPage, errors=(503,))
async def tokens(api: Api, call: Call[TokensPage, None]) -> dict[str, Any]:
    """The tokens by id, never their text."""
    query = call.query
    [after] = read_cursor(query.cursor, "tokens", [0])
    rows = await api.accounts.tokens(query.user_id, after, query.limit)
    more = len(rows) == query.limit
    return {"tokens": rows, "next": make_cursor("tokens", [rows[-1]["id"]]) if more else None}


@route(
    "POST",
    "/api/tokens",
    answer=answers.CreatedToken,
    scope="admin",
    body=NewToken,
    errors=(404, 503),
)
async def create_token(api: Api, call: Call[NoQuery, NewToken]) -> dict[str, Any]:
    """Create a token; its text is shown only now."""
    body = call.body
    expires_at = int(time.time()) + body.expires_in if body.expires_in is not None else None
    token_id, text = await api.accounts.create_token(
        body.user_id, body.scope, body.device_id, body.label, expires_at
    )
    return {
        "id": token_id,
        "token": text,
        "user_id": body.user_id,
        "device_id": body.device_id,
        "scope": body.scope,
        "expires_at": iso_time(expires_at),
    }


@route("DELETE", "/api/tokens/{token_id}", answer=answers.Cut, scope="admin", errors=(404, 503))
async def revoke_token(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:
    """Revoke a token on every instance and cut its connections (4001)."""
    token_hash = await api.accounts.token_hash(call.number("token_id"))
    return await api.control.revoke(token_hash)
