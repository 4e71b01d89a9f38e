"""One request over HTTP, bounded, straight to where it is sent.

Only this module asks over HTTP: no proxy of the environment, no redirect, as a key goes with it. It
knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import Any, Final, NamedTuple

MAX_ANSWER: Final = 1 << 20
"""Bytes of an answer that are read; the largest of ours is smaller."""


class Unanswered(Exception):
    """No answer came; the text says why in words of ours or the system's."""


class Answer(NamedTuple):
    """``document`` is the answer's JSON, ``{}`` where it is no object; ``date`` is seconds since 1970."""

    status: int
    document: dict[str, Any]
    date: float | None


class Place(NamedTuple):
    """An address without its path, and how to reach it: ``timeout`` in seconds."""

    url: str
    timeout: float
    context: ssl.SSLContext | None = None


async def ask(place: Place, path: str, key: str = "", body: object = None) -> Answer:
    """Send a request, a POST if there is a body. Cancelling is safe; a thread may end later.

    Raises:
        Unanswered

    """
    try:
        async with asyncio.timeout(place.timeout + 1):  # the thread has its own, per read
            return await asyncio.to_thread(_ask, place, path, key, body)
    except ssl.SSLCertVerificationError as error:
        raise Unanswered(f"its certificate is not accepted: {error.verify_message}") from None
    except TimeoutError:
        raise Unanswered(f"no answer within {place.timeout:g} s") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise Unanswered(f"no answer within {place.timeout:g} s") from None
        if isinstance(reason, ssl.SSLCertVerificationError):
            text = f"its certificate is not accepted: {reason.verify_message}"
            raise Unanswered(text) from None
        why = getattr(reason, "strerror", None) or "no answer that can be understood"
        raise Unanswered(why) from None
    except (HTTPException, ValueError):
        raise Unanswered("what answers does not speak HTTP") from None


def _ask(place: Place, path: str, key: str, body: object) -> Answer:
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _Stay()]
    if place.context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=place.context))
    request = urllib.request.Request(  # noqa: S310 - the command line takes http and https only
        place.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {}),
    )
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=place.timeout) as answer:
            return _read(answer.status, answer)
    except urllib.error.HTTPError as error:
        with error:
            return _read(error.code, error)


def _read(status: int, answer: HTTPResponse | urllib.error.HTTPError) -> Answer:
    try:
        document = json.loads(answer.read(MAX_ANSWER))
    except (ValueError, RecursionError):
        document = None
    try:
        date = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (TypeError, ValueError, OverflowError):
        date = None
    return Answer(status, document if isinstance(document, dict) else {}, date)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go with it."""

    def redirect_request(self, *_: Any) -> None:
        return None
