"""Requests to services: one HTTP client for all of them.

Only this module imports aiohttp here, and is imported only where a service is configured. It turns
what can go wrong on the way into a `Failure`; it knows no service's words and logs nothing.

Whatever a service does, a request ends in time and holds no more bytes than it may: answers are
unpacked here, piece by piece, as a few kilobytes can unpack to gigabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from wsgateway import __version__
from wsgateway.providers.failures import Failure, Outcome

PIECE: Final = 65_536
"""Bytes that are unpacked at once."""

FINISH_SECONDS: Final = 0.5
"""How long the end of an answer may take that was understood already; a connection whose answer was
read to its end is used again."""

AGENT: Final = f"wsgateway/{__version__}"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may take: to connect, without a byte, and in all, in seconds."""

    connect: float
    silence: float
    total: float


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a service. ``url`` is encoded already and holds nothing secret."""

    service: str
    """What the device calls it, for the sentences about its failures."""
    method: str
    url: str
    headers: Mapping[str, str]
    patience: Patience
    most: int
    """Bytes of the answer, unpacked, that are read."""
    body: bytes | None = None


class Answer:
    """What a service began to answer: status, headers, and the rest as it comes."""

    def __init__(self, response: aiohttp.ClientResponse, request: Request) -> None:
        self._response = response
        self._request = request
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers  # in any case

    @property
    def kind(self) -> str:
        """Its content type without parameters, in small letters."""
        return self._response.content_type

    async def body(self) -> bytes:
        """All of it. Raises Failure."""
        whole = bytearray()
        async for piece in self.pieces():
            whole += piece
        return bytes(whole)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """All of it, unpacked, as it comes. Raises Failure if it is too much or no gzip."""
        read = 0
        async with contextlib.aclosing(self._unpacked()) as unpacked:
            async for piece in unpacked:
                read += len(piece)
                if read > self._request.most:
                    raise Failure(Outcome.TOO_LARGE, self._request.service)
                yield piece

    async def _unpacked(self) -> AsyncGenerator[bytes, None]:
        coding = self.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("identity", "gzip", ""):
            raise Failure(Outcome.GARBAGE, self._request.service)
        gzip = zlib.decompressobj(16 + zlib.MAX_WBITS) if coding == "gzip" else None
        while packed := await self._packed():
            if gzip is None:
                yield packed
                continue
            try:
                waiting = packed
                while waiting and not gzip.eof:
                    yield gzip.decompress(waiting, PIECE)
                    waiting = gzip.unconsumed_tail
            except zlib.error:
                raise Failure(Outcome.GARBAGE, self._request.service) from None
        if gzip is not None:
            yield gzip.flush()  # at most the end of a copy that did not fit into the last piece
        if gzip is not None and not gzip.eof:
            raise Failure(Outcome.BROKEN, self._request.service, retry=True)

    async def _packed(self) -> bytes:
        with _failures(self._request.service):
            return await self._response.content.readany()

    async def finish(self) -> None:
        """Read to the end, so that the connection can be used again, if that is soon."""
        with contextlib.suppress(TimeoutError, Failure, aiohttp.ClientError):
            async with asyncio.timeout(FINISH_SECONDS):
                async for _ in self._response.content.iter_chunked(PIECE):
                    pass


class Outbound:
    """The HTTP client of an instance."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Be ready for requests; on leaving every connection is closed."""
        async with aiohttp.ClientSession(
            # Who asks bounds how many: the connector would make them wait without a deadline.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": AGENT, "Accept-Encoding": "gzip"},
        ) as self._session:
            yield

    @contextlib.asynccontextmanager
    async def ask(self, request: Request) -> AsyncIterator[Answer]:
        """Send a request; the answer as soon as its headers are there. Redirects are not followed.

        Cancelling closes the connection. A request is sent once, except a GET whose connection was
        closed before any answer: the HTTP client sends that once more, as the service may have
        closed a connection that it had kept for us.

        Raises:
            Failure: there is no answer, also while it is read in the body.

        """
        assert self._session is not None, "not running"
        service, patience = request.service, request.patience
        with _failures(service):
            async with (
                asyncio.timeout(patience.total),
                self._session.request(
                    request.method,
                    URL(request.url, encoded=True),
                    data=request.body,
                    headers=request.headers,
                    allow_redirects=False,
                    proxy=proxy_for(request.url),
                    timeout=aiohttp.ClientTimeout(
                        total=None,
                        connect=patience.connect,
                        sock_connect=patience.connect,
                        sock_read=patience.silence,
                    ),
                ) as response,
            ):
                yield Answer(response, request)


@contextlib.contextmanager
def _failures(service: str) -> Iterator[None]:
    """Turn what goes wrong on the way into a Failure."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Failure(Outcome.UNREACHABLE, service, retry=True) from None
    except TimeoutError:
        raise Failure(Outcome.TIMEOUT, service) from None
    except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
        raise Failure(Outcome.UNREACHABLE, service, retry=True, detail=_kind(error)) from None
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
        raise Failure(Outcome.BROKEN, service, retry=True, detail=_kind(error)) from None
    except aiohttp.ClientError as error:  # a status line or header that is none
        raise Failure(Outcome.GARBAGE, service, detail=_kind(error)) from None


def _kind(error: aiohttp.ClientError) -> str:
    """What went wrong, for the log; an error's own text can hold a proxy's password."""
    system = error.strerror if isinstance(error, OSError) else ""
    return f"{type(error).__name__} {system or ''}".strip()


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for a URL (HTTPS_PROXY, HTTP_PROXY, NO_PROXY).

    Not left to aiohttp's trust_env: that also reads ~/.netrc, at every request, and puts what it
    finds there beside our own key.
    """
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)
