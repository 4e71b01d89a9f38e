"""Outside services on this machine, which answer as the real ones do or fail as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from wsgateway import config, providers
from wsgateway.metrics import Metrics

KEY = "sk-very-secret-1234"
MIB = 1 << 20
Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


def packed(document: Any, status: int = 200, kind: str = "application/json") -> web.Response:
    """JSON as the weather service sends all of it: gzipped."""
    body = gzip.compress(json.dumps(document).encode())
    return web.Response(
        status=status, body=body, headers={"Content-Type": kind, "Content-Encoding": "gzip"}
    )


async def abort(request: web.Request) -> web.StreamResponse:
    """No answer: the connection is gone."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut(request: web.Request) -> web.StreamResponse:
    """Half of an answer, then the connection is gone."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = 1000
    await response.prepare(request)
    await response.write(b'{"code":')
    return await abort(request)


async def huge(request: web.Request) -> web.StreamResponse:
    """10 MiB of JSON."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # it hangs up before the end
        await response.write(b'{"code":"200","text":"')
        for _ in range(160):
            await response.write(b"x" * 65_536)
    return response


BOMB = gzip.compress(b" " * (100 * MIB))


def answering(body: bytes | str, status: int = 200, **headers: str) -> Reply:
    """A reply with these very bytes."""

    async def reply(_: web.Request) -> web.StreamResponse:
        data = body.encode() if isinstance(body, str) else body
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(
            status=status, body=data, headers={"Content-Type": "application/json"} | names
        )

    return reply


TROUBLES: dict[str, Reply] = {
    "dropped": abort,
    "cut": cut,
    "huge": huge,
    "bomb": answering(BOMB, Content_Encoding="gzip"),
    "no gzip": answering("{}", Content_Encoding="gzip"),
    "brotli": answering("{}", Content_Encoding="br"),
    "html": answering("<html>", Content_Type="text/html"),
    "no json": answering("{"),
    "deep": answering("[" * 50_000),
    "other shape": answering('{"code":1,"choices":{}}'),
    "redirect": answering("", 302, Location="http://127.0.0.1:9/stolen"),
    "failed": answering("no", 500),
    "limited": answering("{}", 429, Retry_After="1"),
}
"""How any service can fail, by name."""


@dataclass
class Seen:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Fake:
    """A service: good answers, but first those of ``script``, one each."""

    good: Reply
    script: deque[Reply] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    hanging: int = 0
    """Requests that get no answer, now."""
    given_up: int = 0
    """Requests without an answer whose sender hung up."""
    url: str = ""

    def next(self, *replies: Reply | str) -> None:
        """Answer so, before all is well again."""
        self.script += [TROUBLES[each] if isinstance(each, str) else each for each in replies]

    async def hang(self, _: web.Request) -> web.StreamResponse:
        """Answer nothing, for as long as the sender waits."""
        self.hanging += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.hanging -= 1
        raise AssertionError

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append(Seen(request.raw_path, headers, json.loads(body) if body else None))
        reply = self.script.popleft() if self.script else self.good
        return await reply(request)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Fake]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()


V7 = {
    "obsTime": "2020-06-30T21:40+08:00", "temp": "24", "feelsLike": "26", "icon": "101",
    "text": "多云", "wind360": "123", "windDir": "东南风", "windScale": "1", "windSpeed": "3",
    "humidity": "72", "precip": "0.0", "pressure": "1003", "vis": "16", "cloud": "10", "dew": "",
}  # fmt: skip
V1 = {
    "condition": {"text": "Cloudy", "code": "104"},
    "temperature": {"value": 24.4, "unit": "C"},
    "feelsLike": {"value": 25.6},
    "humidity": 0.72,
    "wind": {"direction": {"compass": "SE"}, "speed": {"value": 2.5}},
    "precipitation": {"amount": {"value": 0}},
    "pressure": {"value": 1003.2},
    "visibility": {"value": 16000},
    "uvIndex": 3,
}


async def qweather(request: web.Request) -> web.StreamResponse:
    """The weather of any city, as QWeather answers."""
    if request.path == "/geo/v2/city/lookup":
        name = request.query["location"]
        place = {"name": name, "id": "101010100", "lat": "39.90499", "lon": "116.40529"}
        return packed({"code": "200", "location": [place], "refer": {}})
    if request.path == "/v7/weather/now":
        return packed({"code": "200", "updateTime": "2020-06-30T22:00+08:00", "now": V7})
    if request.path == "/weather/v1/current/39.90/116.41":
        return packed(V1)
    raise web.HTTPNotFound


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> str:
    """One event of a streamed answer."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more}, ensure_ascii=False)}\n\n"


USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
LAST = f'data: {{"choices":[],"usage":{json.dumps(USAGE)}}}\n\ndata: [DONE]\n\n'


def completion(text: str | None, finish: str = "stop", **message: Any) -> Reply:
    """A whole answer of the chat service."""
    words = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": words, "finish_reason": finish}
    return answering(json.dumps({"id": "1", "choices": [choice], "usage": USAGE}))


def streamed(*pieces: str | bytes, then: Reply | None = None) -> Reply:
    """An answer in these pieces, each sent by itself; then perhaps trouble."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece.encode() if isinstance(piece, str) else piece)
            await asyncio.sleep(0)
        return await then(request) if then else response

    return reply


async def openai(request: web.Request) -> web.StreamResponse:
    """Repeats what was said last, as the chat service would answer it."""
    asked = await request.json()
    if request.path != "/v1/chat/completions":
        raise web.HTTPNotFound
    text = f"heard {asked['messages'][-1]['content']}"
    if not asked["stream"]:
        return await completion(text)(request)
    half = len(text) // 2
    parts = chunk(text[:half]), chunk(text[half:]), chunk(finish="stop"), LAST
    return await streamed(": keep-alive\n\n", *parts)(request)


@contextlib.asynccontextmanager
async def asking(**flags: object) -> AsyncIterator[tuple[providers.Services, Metrics]]:
    """The providers of a configuration, ready to be asked. Keys are written a__b."""
    named = {key.replace("__", ".", 1): value for key, value in flags.items()}
    metrics = Metrics()
    services = providers.build(config.load(None, environ={}, flags=named).config, metrics)
    async with services.running():
        yield services, metrics


def weather_flags(fake: Fake, **flags: object) -> dict[str, Any]:
    """What makes a gateway ask a fake weather service."""
    return {"weather__provider": "qweather", "weather__url": fake.url, "weather__key": KEY} | flags


def chat_flags(fake: Fake, **flags: object) -> dict[str, Any]:
    """What makes a gateway ask a fake chat service."""
    return {
        "chat__provider": "openai", "chat__url": f"{fake.url}/v1/", "chat__key": KEY,
        "chat__model": "small",
    } | flags  # fmt: skip
