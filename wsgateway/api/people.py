"""Calls that look at who is connected, and cut them.

Only this module knows how pages are made: a cursor is where the last page ended, sealed so that one
of another call is refused.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta

from wsgateway.api import answers, problems
from wsgateway.api.context import Api
from wsgateway.api.routes import Call, NoQuery, route

Limit = Annotated[int, Meta(ge=1, le=1000, description="Entries of a page.")]
Cursor = Annotated[str, Meta(max_length=200, description="`next` of the page before.")] | None
Identifier = Annotated[int, Meta(ge=0, le=2**63 - 1)] | None


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which page of a list."""

    limit: Limit = 100
    cursor: Cursor = None


class ConnectionsPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which page of the connections of whom."""

    limit: Limit = 100
    cursor: Cursor = None
    user_id: Identifier = None
    device_id: Identifier = None


class Reason(msgspec.Struct, frozen=True):
    """Why devices are cut; sent as the reason of the close frame."""

    reason: Annotated[str, Meta(max_length=100)] = "disconnected"


@route("GET", "/api/users/online", answer=answers.OnlineUsers, query=Page)
async def users_online(api: Api, call: Call[Page, None]) -> dict[str, Any]:
    """The connected users over all instances, by id."""
    [after] = read_cursor(call.query.cursor, "users", [-1])
    users, complete = await api.control.users(after, call.query.limit)
    more = len(users) == call.query.limit
    following = make_cursor("users", [users[-1]["user_id"]]) if more else None
    return {"users": users, "next": following, "complete": complete}


@route("GET", "/api/users/{user_id}", answer=answers.Person, errors=(404,))
async def user(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:
    """A user's connections over all instances."""
    return await _describe(api, "user", call.number("user_id"))


@route("GET", "/api/devices/{device_id}", answer=answers.Person, errors=(404,))
async def device(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:
    """A device's connections over all instances."""
    return await _describe(api, "device", call.number("device_id"))


@route("GET", "/api/connections", answer=answers.Connections, query=ConnectionsPage)
async def connections(api: Api, call: Call[ConnectionsPage, None]) -> dict[str, Any]:
    """The connections of all instances, of a user or of a device."""
    query = call.query
    instance, after = read_cursor(query.cursor, "connections", ["", ""])
    about = {"user_id": query.user_id, "device_id": query.device_id}
    found, complete = await api.control.connections(about, (instance, after), query.limit)
    following = None
    if len(found) == query.limit:
        following = make_cursor("connections", [found[-1]["instance"], found[-1]["id"]])
    return {"connections": found, "next": following, "complete": complete}


@route(
    "DELETE", "/api/connections/{connection_id}", answer=answers.Cut, scope="admin", errors=(404,)
)
async def disconnect_connection(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:
    """Cut one connection (4003)."""
    about = {"connection_id": call.path["connection_id"]}
    answer = await api.control.disconnect(about, "disconnected")
    if not answer["cut"] and answer["complete"]:
        raise problems.not_found("no such connection")
    return answer


@route("POST", "/api/users/{user_id}/disconnect", answer=answers.Cut, scope="admin", body=Reason)
async def disconnect_user(api: Api, call: Call[NoQuery, Reason]) -> dict[str, Any]:
    """Cut all connections of a user (4003)."""
    return await api.control.disconnect({"user_id": call.number("user_id")}, call.body.reason)


@route(
    "POST", "/api/devices/{device_id}/disconnect", answer=answers.Cut, scope="admin", body=Reason
)
async def disconnect_device(api: Api, call: Call[NoQuery, Reason]) -> dict[str, Any]:
    """Cut all connections of a device (4003)."""
    about = {"device_id": call.number("device_id")}
    return await api.control.disconnect(about, call.body.reason)


@route("POST", "/api/users/{user_id}/disable", answer=answers.Cut, scope="admin", errors=(404, 503))
async def disable_user(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:
    """Disable a user on every instance and cut his connections (4001)."""
    return await _set_active(api, call.number("user_id"), False)


@route("POST", "/api/users/{user_id}/enable", answer=answers.Cut, scope="admin", errors=(404, 503))
async def enable_user(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:
    """Enable a user on every instance."""
    return await _set_active(api, call.number("user_id"), True)


async def _set_active(api: Api, user_id: int, active: bool) -> dict[str, Any]:
    if not await api.accounts.exists("user", user_id):
        raise problems.not_found(f"no such user: {user_id}", "user_id")
    return {"active": active, **await api.control.set_active(user_id, active)}


async def _describe(api: Api, kind: Any, number: int) -> dict[str, Any]:
    about = {f"{kind}_id": number}
    found, complete = await api.control.connections(about, ("", ""), 1000)
    if not found and not await api.accounts.exists(kind, number):
        raise problems.not_found(f"no such {kind}: {number}", f"{kind}_id")
    return {
        **about,
        "online": bool(found),
        "connections": found,
        "last_activity": max((one["last_activity"] for one in found), default=None),
        "complete": complete and len(found) < 1000,
    }


def make_cursor(of: str, place: list[Any]) -> str:
    """Where the next page of a list begins."""
    return base64.urlsafe_b64encode(orjson.dumps([of, *place])).decode().rstrip("=")


def read_cursor(text: str | None, of: str, start: list[Any]) -> list[Any]:
    """The place that a cursor names; ``start`` without one. Raises Problem."""
    if text is None:
        return start
    try:
        kind: Any
        place: list[Any]
        kind, *place = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, TypeError, binascii.Error):
        raise problems.invalid("cursor", "not a cursor of this call") from None
    if (
        kind != of
        or [type(part) for part in place] != [type(part) for part in start]
        or any(isinstance(part, int) and part >= 2**63 for part in place)
    ):
        raise problems.invalid("cursor", "not a cursor of this call")
    return place
