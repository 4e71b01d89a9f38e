"""What a handshake request asks for, and the answers that are no WebSocket.

Only this module reads paths and headers. It decides nothing about who may connect, and runs
without sockets or a loop. Nothing of it may be logged: paths and headers hold tokens.
"""

from __future__ import annotations

import enum
import re
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

import orjson
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from wsgateway.wire import SUBPROTOCOL

_DEVICE = re.compile(r"/ws/device(?:/token/(?P<token>[^/]+)|/(?P<user_id>\d{1,19}))?/?")
_NEEDS_DECODING = re.compile("[&%+]")

MAX_QUERY_FIELDS = 32
"""Fields of a query that are looked at."""


class Route(enum.Enum):
    """What a path leads to."""

    DEVICE = "device"
    HEALTH = "health"
    READY = "ready"
    NOWHERE = "nowhere"


class Visit(NamedTuple):
    """What a request asks for.

    ``path_user_id`` is what a deprecated path claims, never to be trusted. ``versioned`` says that
    the client offered `wsgateway.v1` and so reads close codes.
    """

    route: Route
    token: str | None
    path_user_id: int | None
    versioned: bool
    origin: str | None


def read(request: Request) -> Visit:
    """Read a request. Never raises: what cannot be understood leads nowhere or holds no token."""
    path, _, query = request.path.partition("?")
    offered = _subprotocols(request.headers)
    versioned = SUBPROTOCOL in offered
    origins = request.headers.get_all("Origin")
    origin = ", ".join(origins) if origins else None
    found = _DEVICE.fullmatch(path)
    if found is None:
        plain = {"/healthz": Route.HEALTH, "/readyz": Route.READY}
        return Visit(plain.get(path, Route.NOWHERE), None, None, versioned, origin)
    if found["token"]:
        token: str | None = unquote(found["token"])
    else:
        token = _header_token(request.headers)
        if token is None and versioned:
            token = next((p[6:] for p in offered if p.startswith("token.")), None)
        if token is None:
            token = _query_token(query)
    user_id = int(found["user_id"]) if found["user_id"] else None
    return Visit(Route.DEVICE, token or None, user_id, versioned, origin)


def unauthorized() -> Response:
    """One and the same answer to every client that may not connect, whatever the reason."""
    return json_response(HTTPStatus.FORBIDDEN, {"error": "unauthorized"})


def unavailable(retry_after: int) -> Response:
    """The answer to a client that may come again in so many seconds. Clients retry 5xx, not 429."""
    response = json_response(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "unavailable"})
    response.headers["Retry-After"] = str(retry_after)
    return response


def json_response(status: HTTPStatus, document: object) -> Response:
    """An answer that ends the connection."""
    body = orjson.dumps(document)
    headers = Headers(
        {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Connection": "close",
        }
    )
    return Response(status.value, status.phrase, headers, body)


def _subprotocols(headers: Headers) -> list[str]:
    lists = headers.get_all("Sec-WebSocket-Protocol")
    return [name.strip() for line in lists for name in line.split(",")] if lists else []


def _header_token(headers: Headers) -> str | None:
    """The token of an Authorization header; two of them are ambiguous and hold none."""
    values = headers.get_all("Authorization")
    if len(values) > 1:
        return ""
    scheme, _, token = values[0].partition(" ") if values else ("", "", "")
    return token.strip() if scheme.lower() in ("token", "bearer") else None


def _query_token(query: str) -> str | None:
    if query.startswith("token=") and not _NEEDS_DECODING.search(query):
        return query[6:]
    try:
        fields = parse_qsl(query, max_num_fields=MAX_QUERY_FIELDS)
    except ValueError:
        return None
    return next((value for name, value in fields if name == "token"), None)
