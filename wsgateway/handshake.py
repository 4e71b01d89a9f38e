"""What a handshake request asks for, and how it is answered.

Only this module reads paths and headers. It decides nothing about who may connect, and runs
without sockets or a loop. Nothing of it may be logged: paths and headers hold tokens.

The common request takes a fast path (see `read_plain`); every other is read, judged and answered
by the library's `ServerProtocol`, whose answers the fast path repeats.
"""

from __future__ import annotations

import enum
import logging
import re
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import orjson
from websockets.http11 import MAX_LINE_LENGTH, MAX_NUM_HEADERS, Request
from websockets.server import ServerProtocol
from websockets.utils import accept_key

from wsgateway.deflate import NOTHING_AGREED, Deflate, agreed_window
from wsgateway.wire import SUBPROTOCOL

CORE_LOG = logging.getLogger("websockets.server")
CORE_LOG.setLevel(logging.WARNING)  # below, the library logs the request line, with the token

_DEVICE = re.compile(r"/ws/device(?:/token/(?P<token>[^/]+)|/(?P<user_id>\d{1,19}))?/?")
_NEEDS_DECODING = re.compile("[&%+]")

_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_TOKENS = re.compile(r"[-!#$%&'*+.^_`|~0-9a-zA-Z]+(?:, ?[-!#$%&'*+.^_`|~0-9a-zA-Z]+)*")
_UPGRADES = frozenset({"upgrade", "keep-alive, upgrade"})
_BODIES = frozenset({"content-length", "transfer-encoding"})

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
    the client offered `wsgateway.v1` and so reads close codes. ``answer`` is what completes the
    handshake if the request is ``valid``, else what says why it is not. ``window_bits`` is the
    window size that the answer agrees on for compressed messages; 0 if for none.
    """

    route: Route
    method: str
    token: str | None
    path_user_id: int | None
    versioned: bool
    origin: str | None
    valid: bool
    answer: bytes
    window_bits: int


class Malformed(NamedTuple):
    """A request that cannot be read. ``reason`` is a word of ours for the metric."""

    reason: str
    answer: bytes


class Reader:
    """Reads one request, however it is cut. Without ``deflate``, offers of extensions are ignored."""

    __slots__ = ("_core", "_deflate", "_fast", "_limit", "_read", "rest")

    def __init__(self, limit: int, deflate: Deflate | None = None, *, fast: bool = True) -> None:
        self._limit = limit
        self._deflate = deflate
        self._fast = fast
        self._core: ServerProtocol | None = None
        self._read = b""
        self.rest = b""
        """What came after the request."""

    def feed(self, data: bytes) -> Visit | Malformed | None:
        """What is asked for, once the request is complete; None if more of it has to come.

        Not to be called again after an answer.
        """
        before = len(self._read)
        read = self._read = self._read + data
        end = read.find(b"\r\n\r\n", max(0, before - 3)) + 4
        complete = end >= 4
        if (end if complete else len(read)) > self._limit:
            return Malformed("too_large", _empty(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        if complete:
            self.rest = read[end:]
            if self._fast and self._core is None:
                visit = read_plain(read[:end], self._deflate)
                if visit is not None:
                    return visit
        return self._through_core(read[before : end if complete else None])

    def forwarded_for(self) -> str:
        """All ``X-Forwarded-For`` of the complete request, joined; empty if it has none.

        Apart from the rest, so that requests cost no more where no proxy is trusted.
        """
        head = self._read[: len(self._read) - len(self.rest)].decode("latin-1")
        fields = (line.partition(":") for line in head.split("\r\n"))
        return ",".join(value for name, _, value in fields if name.lower() == "x-forwarded-for")

    def _through_core(self, data: bytes) -> Visit | Malformed | None:
        if self._core is None:
            self._core = ServerProtocol(
                extensions=[self._deflate.factory] if self._deflate else None,
                select_subprotocol=_select_subprotocol,
                logger=CORE_LOG,
            )
        core = self._core
        core.receive_data(data)
        events = core.events_received()
        if events:
            assert isinstance(events[0], Request)
            return _judge(core, events[0])
        if core.handshake_exc is None:
            return None
        answer = b"".join(core.data_to_send())
        return Malformed("bad_request", answer or _empty(HTTPStatus.BAD_REQUEST))


def read_plain(head: bytes, deflate: Deflate | None = None) -> Visit | None:
    """The fast path: read a request that is plainly a valid one of a device, as the core would.

    Plain is ASCII without tabs, shorter than one line may be, with every header once, a path of the
    device socket, and values that nearly all clients send (RFC 6455, section 4.2.1).

    Returns:
        None for every other request, valid or not: the library judges it.

    """
    if len(head) > MAX_LINE_LENGTH or not head.startswith(b"GET /ws/device") or not head.isascii():
        return None
    first, *lines = head[:-4].decode().split("\r\n")
    if len(lines) > MAX_NUM_HEADERS or not first.endswith(" HTTP/1.1") or first.count(" ") != 2:
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not (colon and line.isprintable() and name.replace("-", "a").isalnum()):
            return None
        headers[name.lower()] = value.strip(" ")
    key = headers.get("sec-websocket-key", "")
    offered = headers.get("sec-websocket-protocol")
    extension = headers.get("sec-websocket-extensions")
    agreed = deflate.usual.get(extension) if deflate is not None else NOTHING_AGREED
    if (
        len(headers) < len(lines)
        or not first.isprintable()
        or headers.get("upgrade", "").lower() != "websocket"
        or headers.get("connection", "").lower() not in _UPGRADES
        or headers.get("sec-websocket-version") != "13"
        or not _KEY.fullmatch(key)
        or not (offered is None or _TOKENS.fullmatch(offered))
        or not _BODIES.isdisjoint(headers)
        or agreed is None
    ):
        return None
    names = _names(offered) if offered else []
    chosen = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n" if SUBPROTOCOL in names else ""
    answer = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept_key(key)}\r\n{agreed[0]}{chosen}\r\n"
    ).encode()
    credentials, origin = headers.get("authorization"), headers.get("origin")
    visit = _visit(
        "GET", first[4:-9], names, credentials, origin,
        valid=True, answer=answer, window_bits=agreed[1],
    )  # fmt: skip
    return visit if visit.route is Route.DEVICE else None


def _judge(core: ServerProtocol, request: Request) -> Visit:
    headers = request.headers
    credentials = headers.get_all("Authorization")
    response = core.accept(request)
    return _visit(
        request.method,
        request.path,
        _names(",".join(headers.get_all("Sec-WebSocket-Protocol"))),
        # Two of them are ambiguous and hold no token.
        credentials[0] if len(credentials) == 1 else "Token" if credentials else None,
        ", ".join(headers.get_all("Origin")) if "Origin" in headers else None,
        valid=response.status_code == HTTPStatus.SWITCHING_PROTOCOLS,
        answer=response.serialize(),
        window_bits=agreed_window(core),
    )


def _names(subprotocols: str) -> list[str]:
    return [name.strip() for name in subprotocols.split(",")]


def _visit(
    method: str,
    target: str,
    offered: list[str],
    credentials: str | None,
    origin: str | None,
    *,
    valid: bool,
    answer: bytes,
    window_bits: int,
) -> Visit:
    """Never raises: what cannot be understood leads nowhere or holds no token."""
    path, _, query = target.partition("?")
    versioned = SUBPROTOCOL in offered
    found = _DEVICE.fullmatch(path)
    if found is None:
        plain = {"/healthz": Route.HEALTH, "/readyz": Route.READY}
        route = plain.get(path, Route.NOWHERE)
        return Visit(route, method, None, None, versioned, origin, valid, answer, window_bits)
    path_token, path_user_id = found.groups()
    if path_token:
        token: str | None = unquote(path_token)
    else:
        token = _header_token(credentials) if credentials else None
        if token is None and versioned:
            token = next((p[6:] for p in offered if p.startswith("token.")), None)
        if token is None:
            token = _query_token(query)
    user_id = int(path_user_id) if path_user_id else None
    return Visit(
        Route.DEVICE, method, token or None, user_id, versioned, origin, valid, answer, window_bits
    )


def unauthorized() -> bytes:
    """One and the same answer to every client that may not connect, whatever the reason."""
    return json_response(HTTPStatus.FORBIDDEN, {"error": "unauthorized"})


def unavailable(retry_after: int) -> bytes:
    """The answer to a client that may come again in so many seconds. Clients retry 5xx, not 429."""
    return json_response(
        HTTPStatus.SERVICE_UNAVAILABLE, {"error": "unavailable"}, f"Retry-After: {retry_after}"
    )


def json_response(status: HTTPStatus, document: object, *headers: str, head: bool = False) -> bytes:
    """An answer that ends the connection, with more header lines; without a body for HEAD."""
    body = orjson.dumps(document)
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
        "\r\n",
    )
    return "\r\n".join(lines).encode() + (b"" if head else body)


def _empty(status: HTTPStatus) -> bytes:
    """The answer to a request that the library could not read."""
    line = f"HTTP/1.1 {status.value} {status.phrase}"
    return f"{line}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


def _select_subprotocol(_: ServerProtocol, offered: Any) -> Any:
    """`wsgateway.v1` or none at all: never the token that travels in the same list."""
    return SUBPROTOCOL if SUBPROTOCOL in offered else None


def _header_token(credentials: str) -> str | None:
    scheme, _, token = credentials.partition(" ")
    return token.strip() if scheme.lower() in ("token", "bearer") else None


def _query_token(query: str) -> str | None:
    if query.startswith("token=") and not _NEEDS_DECODING.search(query):
        return query[6:]
    try:
        fields = parse_qsl(query, max_num_fields=MAX_QUERY_FIELDS)
    except ValueError:
        return None
    return next((value for name, value in fields if name == "token"), None)
