"""The device socket as a device meets it, through the real listener and whatever stands before it.

Only this module is a WebSocket client. It knows neither the HTTP API nor Redis: who else sends to
its device is given to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus

from wsgateway.doctor import certificate
from wsgateway.doctor.finding import Finding, failed, passed, skipped, warned
from wsgateway.errors import one_line
from wsgateway.wire import CloseCode

TYPE: Final = "wsgateway_doctor"
"""The type of the messages that are sent to the device; a device ignores types it does not know."""

SLOW_SECONDS: Final = 1.0
"""A ping that takes longer tells of a loop that is kept busy, or of a very long way."""

FAILURES = (OSError, TimeoutError, InvalidHandshake, ConnectionClosed)
"""How a device's connection can end."""

PROXY_HINT: Final = "nginx proxy_read_timeout, HAProxy timeout tunnel, the balancer's idle time-out"

UPGRADE_HINT: Final = (
    "let the proxy pass the upgrade on (nginx: proxy_http_version 1.1 and the headers Upgrade and "
    "Connection), or correct --device-url"
)


class Door(NamedTuple):
    """Where devices connect: ``ws://`` or ``wss://`` with the path, seconds for each step."""

    url: str
    timeout: float
    context: ssl.SSLContext | None = None


class Sender(NamedTuple):
    """Another way to send to a user's device: ``send`` answers why it could not."""

    name: str
    send: Callable[[int, dict[str, Any]], Awaitable[Finding | None]]
    fix: str
    """What to do when a message was sent and does not arrive."""


class _Direct(connect):
    """Follows no redirect: the token would go with it."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


async def check_stranger(door: Door) -> Finding:
    """Come with a token that nobody has: to be refused proves the listener and the database."""
    name = "refusal"
    try:
        async with _connected(door, f"wsg_{secrets.token_urlsafe(32)}") as device:
            async with asyncio.timeout(door.timeout):
                await device.recv()
    except InvalidStatus as error:
        if error.response.status_code == HTTPStatus.FORBIDDEN:
            return passed(name, "a token that nobody has is refused")
        return _explain(name, door, error)
    except ConnectionClosed as error:
        if error.rcvd is not None and error.rcvd.code == CloseCode.TOKEN_ENDED:
            return passed(name, "a token that nobody has is refused")
        return _explain(name, door, error)
    except FAILURES as error:
        return _explain(name, door, error)
    fix = "make sure that --device-url is wsgateway's, with nothing between that adds a token"
    return failed(name, "a token that nobody has was let in", fix)


async def check(
    door: Door, token: str, senders: Sequence[Sender], idle: float | None, interval: float
) -> list[Finding]:
    """Be a device: connect, ping, hear what each sender sends, and be silent for ``idle`` seconds.

    ``interval`` is how often the gateway pings, in seconds.
    """
    found: list[Finding] = []
    name = "device"
    try:
        async with _connected(door, token) as device:
            status = await _hear(device, door.timeout, type="connection_status")
            user_id = int(status["user_id"])
            found.append(passed(name, f"connected as user {user_id}"))
            found += _served_certificate(device)
            name = "ping"
            started = time.perf_counter()
            await device.send('{"type":"ping"}')
            await _hear(device, door.timeout, type="pong")
            found.append(_took(name, time.perf_counter() - started))
            for sender in senders:
                name = sender.name
                found.append(await _round(device, door, sender, user_id))
            name = "silence"
            found.append(await _be_silent(device, idle, interval))
    except FAILURES as error:
        found.append(_explain(name, door, error))
    except (ValueError, KeyError, TypeError):
        fix = "let --device-url name wsgateway's device socket"
        found.append(failed(name, "what answers does not speak wsgateway's words", fix))
    return found


@contextlib.asynccontextmanager
async def _connected(door: Door, token: str) -> AsyncIterator[ClientConnection]:
    async with _Direct(
        door.url,
        additional_headers={"Authorization": f"Token {token}"},  # in a URL it would be logged
        compression=None,
        open_timeout=door.timeout,
        close_timeout=1,
        ping_interval=None,
        proxy=None,
        ssl=door.context,
    ) as device:
        yield device


async def _hear(device: ClientConnection, seconds: float, **fields: str) -> dict[str, Any]:
    """The next message with these fields; others, which may be real ones, are passed over."""
    async with asyncio.timeout(seconds):
        while True:
            message = json.loads(await device.recv())
            if isinstance(message, dict) and fields.items() <= message.items():
                return message


async def _round(device: ClientConnection, door: Door, sender: Sender, user_id: int) -> Finding:
    mark = secrets.token_hex(8)
    started = time.perf_counter()
    problem = await sender.send(user_id, {"type": TYPE, "message": mark})
    if problem is not None:
        return problem
    try:
        await _hear(device, door.timeout, message=mark)
    except TimeoutError:
        what = f"sent, and not received by the device within {door.timeout:g} s"
        return failed(sender.name, what, sender.fix)
    return _took(sender.name, time.perf_counter() - started)


async def _be_silent(device: ClientConnection, idle: float | None, interval: float) -> Finding:
    """Send nothing, as a device that has nothing to say, and see who cuts it."""
    name = "silence"
    if idle is None:
        hint = f"a proxy must bear {interval:g} s of silence (keepalive.interval): {PROXY_HINT}"
        return skipped(name, f"not tried without --idle SECONDS; {hint}")
    started = time.monotonic()
    try:
        async with asyncio.timeout(idle):
            while True:
                await device.recv()
    except TimeoutError:
        return passed(name, f"a silent device stays connected for {idle:g} s")
    except ConnectionClosed as error:
        after = time.monotonic() - started
        if error.rcvd is not None and error.rcvd.code in set(CloseCode):
            return failed(name, _closed(error), "see the gateway's log")
        what = f"cut after {after:.0f} s of silence, by what stands before the gateway"
        fix = f"raise its time-out over {interval:g} s ({PROXY_HINT}), or lower keepalive.interval"
        return failed(name, what, fix)


def _took(name: str, seconds: float) -> Finding:
    what = f"{seconds * 1000:.1f} ms"
    if seconds > SLOW_SECONDS:
        fix = "look at the gateway's load and at its log for slow operations"
        return warned(name, f"took {what}", fix)
    return passed(name, what)


def _served_certificate(device: ClientConnection) -> list[Finding]:
    """How long the certificate is good that a device is shown."""
    shown = device.transport.get_extra_info("ssl_object")
    der = shown.getpeercert(binary_form=True) if shown is not None else None
    return [certificate.check("certificate shown", der)] if der else []


def _explain(name: str, door: Door, error: BaseException) -> Finding:
    """Why a connection failed, in words that lead to its cause."""
    url = door.url
    if isinstance(error, InvalidStatus):
        return _status(name, error.response.status_code)
    if isinstance(error, ssl.SSLCertVerificationError):
        fix = "correct the certificate's name or chain; $SSL_CERT_FILE names an authority of yours"
        return failed(name, f"the certificate is not accepted: {error.verify_message}", fix)
    if isinstance(error, ssl.SSLError | InvalidMessage | EOFError):
        fix = "correct --device-url: ws:// without TLS, wss:// with it, and the port"
        return failed(name, f"{url}: what answers is no WebSocket server", fix)
    if isinstance(error, TimeoutError):
        fix = "look for a firewall on the way, and at the gateway's log and load"
        return failed(name, f"{url}: no answer within {door.timeout:g} s", fix)
    if isinstance(error, ConnectionClosed):
        return failed(name, _closed(error), "see the gateway's log")
    if isinstance(error, OSError):
        fix = "start wsgateway there (see the log why it ended), or name it with --device-url"
        return failed(name, f"{url}: {error.strerror or 'cannot be reached'}", fix)
    return failed(name, f"{url}: the answer is no WebSocket handshake", UPGRADE_HINT)


def _status(name: str, code: int) -> Finding:
    what = f"the handshake was answered with {code}"
    if code in (HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED):
        fix = "wsgateway token check - says why (on the host of this gateway's database)"
        return failed(name, "the token was refused", fix)
    if code == HTTPStatus.SERVICE_UNAVAILABLE:
        return failed(name, f"{what}: it takes nobody in now", "see readiness and the log")
    if code in (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT):
        return failed(name, f"{what}: a proxy does not reach it", "start it, or mend the proxy")
    return failed(name, what, UPGRADE_HINT)


def _closed(error: ConnectionClosed) -> str:
    if error.rcvd is None:
        return "the connection was cut without a close frame"
    return f"the connection was closed with {error.rcvd.code} {one_line(error.rcvd.reason)}".strip()
