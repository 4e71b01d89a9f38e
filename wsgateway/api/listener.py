"""The HTTP listener: requests in, JSON out.

Only this module imports aiohttp. It reads and checks what a call's declaration says, finds out who
calls, and words every failure; it bounds the body's size and time, the requests under way and the
connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from functools import partial
from http import HTTPStatus
from time import monotonic, perf_counter
from types import MappingProxyType
from typing import Any, Final

import orjson
from aiohttp import web

from wsgateway import background, config, sockets
from wsgateway.api import documents, messages, people, problems, queue, status, tokens
from wsgateway.api.context import Api
from wsgateway.api.problems import Problem
from wsgateway.api.protocol import CallerProtocol, NoRoomProtocol
from wsgateway.api.requests import (
    NO_CALL,
    convert,
    name_call,
    read_idempotency_key,
    read_path,
    read_query,
)
from wsgateway.api.routes import ROUTES, Answer, Call, Route
from wsgateway.auth import Authenticator, Caller
from wsgateway.errors import Conflict, NotFound, Refused, StoreError
from wsgateway.proxy import Networks
from wsgateway.sockets import Acceptor, Preamble
from wsgateway.tls import Tls

log = logging.getLogger(__name__)

MODULES = (messages, people, tokens, queue, status)
"""Where the calls are declared."""

SAMPLE_SECONDS: Final = 5.0
"""Seconds between two looks at the counters, for the rates."""

STOP_SECONDS: Final = 2.0
"""How long requests under way may take when the gateway stops."""

JSON_HEADERS: Final = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "Server": "wsgateway",
}

INSTANCE_HEADER: Final = "Wsgateway-Instance"
"""Says in every answer which instance gave it."""

Handler = Any


class Listener:
    """Answers requests to one instance."""

    def __init__(
        self,
        settings: config.Api,
        api: Api,
        authenticator: Authenticator,
        tls: Tls | None,
        proxies: Networks | None,
    ) -> None:
        self._tls = tls if settings.tls else None
        self._proxies = proxies
        self._api = api
        self._authenticator = authenticator
        self._under_way = 0
        self._headers = {**JSON_HEADERS, INSTANCE_HEADER: api.cluster.name}
        self._take(settings)

    def configure(self, config: config.Config) -> None:
        """Answer from now on as another configuration says; who calls is found out anew each time."""
        self._take(config.api)

    def _take(self, settings: config.Api) -> None:
        self._settings = settings
        self._keys = {
            key.sha256: Caller(key.name, key.scope, f"key {key.name}") for key in settings.keys
        }
        self.body_timeout = settings.body_timeout

    @contextlib.asynccontextmanager
    async def open(self, passed: socket.socket | None = None) -> AsyncIterator[tuple[str, int]]:
        """Listen; the address. On leaving, requests under way get a moment to be answered.

        ``passed`` is a socket that listens already, in place of the configured address.

        Raises:
            StartError: the address cannot be listened on.

        """
        settings = self._settings
        host = passed.getsockname()[0] if passed else settings.host
        app = web.Application(client_max_size=0)  # no limit: `_body` looks at the length before
        for route in ROUTES:
            app.router.add_route(
                route.method, route.path, self._handler(route), expect_handler=self._expect
            )
        for path, document in documents.documents(
            self._api, metrics_keyed=not _is_loopback(host)
        ).items():
            app.router.add_get(path, self._plain(document))
        app.middlewares.append(self._answer)
        runner = web.AppRunner(
            app, handle_signals=False, access_log=None, shutdown_timeout=STOP_SECONDS
        )
        await runner.setup()
        try:
            listening = await sockets.listen(
                settings.host,
                settings.port,
                settings.connections,
                "for the HTTP API set api.port, or api.enabled = false",
                passed=passed,
            )
            assert runner.server is not None
            acceptor = Acceptor(
                listening,
                partial(self._protocol, runner.server),
                self._preamble(runner.server),
                shared=passed is not None,
            )
            async with background.running(self._sample()):
                try:
                    await acceptor.start(settings.connections)
                    yield acceptor.addresses[0]
                    await acceptor.stop()
                finally:
                    await acceptor.close()
        finally:
            await runner.cleanup()

    def _preamble(self, server: web.Server) -> Preamble | None:
        """What comes before the first request of a connection, if anything."""
        settings = self._settings
        if self._tls is None and not settings.proxy_protocol:
            return None
        return Preamble(
            tls=self._tls,
            proxies=self._proxies if settings.proxy_protocol else None,
            bounds=lambda: (self._settings.body_timeout, self._settings.connections),
            has_room=lambda entering: (
                len(server.connections) + entering <= self._settings.connections
            ),
            metrics=self._api.metrics,
        )

    def _protocol(
        self, server: web.Server, address: str = "", _accepted_at: float = 0.0
    ) -> asyncio.Protocol:
        if len(server.connections) >= self._settings.connections:
            self._api.metrics.api_busy += 1
            return NoRoomProtocol()
        return CallerProtocol(server, address, self.body_timeout, self.failure)

    def _address(self, request: web.Request) -> str:
        """Who calls, as far as trusted proxies tell."""
        assert isinstance(request.protocol, CallerProtocol)
        address = request.protocol.address or request.remote or "unknown"
        if self._proxies is None:
            return address
        return self._proxies.client(
            address, ",".join(request.headers.getall("X-Forwarded-For", ()))
        )

    def _handler(self, route: Route) -> Handler:
        called = f"{route.method} {route.path}"

        async def handle(request: web.Request) -> web.Response:
            started = perf_counter()
            if self._under_way >= self._settings.requests:
                self._api.metrics.api_busy += 1
                raise problems.unavailable("too many requests are under way", 1)
            self._under_way += 1
            try:
                caller = await self._caller(request, route)
                call = Call(
                    caller,
                    read_path(request, route),
                    read_query(request, route),
                    await self._body(request, route),
                    read_idempotency_key(request),
                )
                answer = await route.function(self._api, call)
            except NotFound as error:
                raise problems.not_found(str(error)) from None
            except Conflict as error:
                raise problems.conflict(str(error)) from None
            except StoreError:
                raise problems.unavailable("the token database does not answer") from None
            except ConnectionError:
                raise problems.unavailable("redis does not answer") from None
            finally:
                self._under_way -= 1
                self._api.metrics.api_seconds.note(called, perf_counter() - started)
            document = (
                answer.body
                if isinstance(answer, Answer)
                else {"status": "success", "message": "ok", "data": answer}
            )
            return web.Response(body=orjson.dumps(document), headers=self._headers)

        return handle

    def _plain(self, document: documents.Document) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            if document.keyed:
                await self._identify(request)
            code, headers, body = document.make()
            return web.Response(body=body, status=code, headers={**self._headers, **headers})

        return handle

    async def _caller(self, request: web.Request, route: Route) -> Caller:
        caller = await self._identify(request)
        if route.scope == "admin" and caller.scope != "admin":
            raise problems.forbidden("this call needs a key of scope admin")
        return caller

    async def _identify(self, request: web.Request) -> Caller:
        """Who calls. Raises Problem."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if not key or scheme.lower() not in ("token", "bearer"):
            key = request.headers.get("X-API-Key", "")
        key = key.strip()
        if not key:
            raise problems.unauthorized()
        if self._keys:
            known = self._keys.get(hashlib.sha256(key.encode(errors="replace")).hexdigest())
            if known is not None:
                return known
        try:
            return await self._authenticator.caller(key)
        except Refused as error:
            if error.retry_after is not None:
                raise problems.unavailable("the token database does not answer") from None
            log.warning(
                "api call refused reason=%s address=%s", error.reason, self._address(request)
            )
            if error.reason == "scope":
                raise problems.forbidden("a device's token is no key of this API") from None
            raise problems.unauthorized() from None

    async def _body(self, request: web.Request, route: Route) -> Any:
        """The body as the call declares it. Raises Problem."""
        if route.body is None:
            return None
        length = request.content_length
        if length is None and request.body_exists:
            raise Problem(HTTPStatus.LENGTH_REQUIRED, "length", "Content-Length is needed")
        if length is not None and length > self._settings.body_bytes:
            raise problems.too_large(f"longer than {self._settings.body_bytes} bytes")
        if request.content_type != "application/json" and length:
            raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "media_type", "send application/json")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "media_type", "send it uncompressed")
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                raw = await request.read()
        except TimeoutError:
            raise Problem(
                HTTPStatus.REQUEST_TIMEOUT, "timeout", "the body did not arrive in time"
            ) from None
        try:
            document = orjson.loads(raw or b"{}")
        except orjson.JSONDecodeError:
            raise problems.malformed("the body is no JSON") from None
        return convert(document, route.body, strict=True)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count every answer, and give every failure in JSON, also those that aiohttp finds."""
        if isinstance(request.protocol, CallerProtocol):
            request.protocol.heard()
        try:
            response: web.StreamResponse = await handler(request)
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception as error:  # noqa: BLE001 - nobody above could answer it
            problem, headers = _problem(error)
            return self.failure(problem, problem.status.value, name_call(request), headers)
        self._api.metrics.api_requests[*name_call(request), response.status] += 1
        return response

    def failure(
        self,
        problem: Problem,
        status: int,
        call: tuple[str, str] = NO_CALL,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> web.Response:
        """The answer to a call that fails, counted."""
        self._api.metrics.api_requests[*call, status] += 1
        more = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
        return web.Response(
            body=orjson.dumps(problem.document()),
            status=status,
            headers={**self._headers, **headers, **more},
        )

    async def _expect(self, request: web.Request) -> web.Response | None:
        if request.headers["Expect"].lower() != "100-continue":
            problem = Problem(HTTPStatus.EXPECTATION_FAILED, "expectation", "not expected here")
            return self.failure(problem, problem.status.value, name_call(request))
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
        return None

    async def _sample(self) -> None:
        while True:
            self._api.rates.sample(monotonic())
            await asyncio.sleep(SAMPLE_SECONDS)


def _problem(error: Exception) -> tuple[Problem, dict[str, str]]:
    """What a caller is told of a failure: its words, and headers; never an exception's text."""
    if isinstance(error, Problem):
        return error, {}
    if isinstance(error, web.HTTPMethodNotAllowed):
        problem = Problem(HTTPStatus.METHOD_NOT_ALLOWED, "method", "not with this method")
        return problem, {"Allow": error.headers["Allow"]}
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return problems.too_large("the body is too long"), {}
    if isinstance(error, web.HTTPNotFound):
        return problems.not_found("no such path"), {}
    if isinstance(error, web.HTTPException):
        status = HTTPStatus(error.status)
        return Problem(status, "http", status.phrase), {}
    log.error("an api call failed", exc_info=error)
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "Internal server error"), {}


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
