"""A caller's connection to the HTTP API, below its requests.

Only this module knows aiohttp's protocol: what is no HTTP gets one line in JSON, and who says
nothing is cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from aiohttp import web

from wsgateway.api import problems
from wsgateway.api.problems import Problem

log = logging.getLogger(__name__)


class CallerProtocol(web.RequestHandler):
    """One connection of a caller."""

    __slots__ = ("_failure", "_silent", "_silent_seconds", "address")

    def __init__(
        self,
        server: web.Server,
        address: str,
        silent_seconds: float,
        failure: Callable[[Problem, int], web.Response],
    ) -> None:
        """``failure`` makes the answer to what is no HTTP; ``silent_seconds`` is how long the caller
        may take for its first request."""
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # as AppRunner does
        )
        self.address = address
        """What a PROXY header told of the caller; empty without."""
        self._silent_seconds = silent_seconds
        self._failure = failure
        self._silent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        abort = cast(asyncio.Transport, transport).abort
        self._silent = asyncio.get_running_loop().call_later(self._silent_seconds, abort)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.heard()
        super().connection_lost(exc)

    def heard(self) -> None:
        """A whole request came."""
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,  # noqa: ARG002 - its text is not for the caller
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        log.warning("api request refused: no HTTP address=%s", self.address or request.remote)
        response = self._failure(problems.malformed("this is no HTTP request"), status)
        response.force_close()
        return response


class NoRoomProtocol(asyncio.Protocol):
    """A connection that there is no room for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
