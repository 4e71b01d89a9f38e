"""What all providers share: breaker, cache, history, retries; and how a gateway uses them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection

from tests.conftest import Accounts, Instance, ask, eventually, running_gateway
from tests.services import (
    KEY,
    Fake,
    asking,
    chat_flags,
    chunk,
    openai,
    qweather,
    streamed,
    weather_flags,
)
from wsgateway import config, providers
from wsgateway.errors import ConfigError
from wsgateway.metrics import Metrics
from wsgateway.providers import History, retry
from wsgateway.providers.breaker import Breaker
from wsgateway.providers.cache import Cache
from wsgateway.providers.signer import Signer

ROOT = Path(__file__).parent.parent


# Rooms without a loop.


def test_a_breaker_opens_after_failures_in_a_row_and_closes_after_a_success() -> None:
    breaker = Breaker(failures=2, pause=30)
    assert breaker.wait(0) == 0
    assert not breaker.failed(0)
    assert not breaker.succeeded()
    assert not breaker.failed(1)  # the success between forgave the first
    assert breaker.failed(2)
    assert breaker.wait(12) == 20
    assert breaker.wait(32) == 0  # one may try
    assert breaker.wait(32) > 0  # and no other
    assert breaker.failed(33)
    assert breaker.wait(62) == 1
    assert breaker.wait(63) == 0
    breaker.abandoned()
    assert breaker.wait(63) == 0  # the one that was to try has left: the next tries
    assert breaker.succeeded()
    assert [breaker.wait(63) for _ in range(3)] == [0, 0, 0]


def test_a_breaker_rests_as_long_as_it_is_told_and_late_news_do_not_shorten_that() -> None:
    breaker = Breaker(failures=1, pause=30)
    assert breaker.rest(0, 100)
    assert not breaker.rest(0, 50)
    assert not breaker.succeeded()  # of a request that began before
    assert not breaker.failed(1)
    assert breaker.wait(1) == 99


@given(
    st.lists(st.tuples(st.sampled_from(["wait", "ok", "bad", "gone"]), st.floats(0, 5))),
    st.integers(1, 3),
)
def test_a_breaker_lets_somebody_try_again_whatever_happened(
    happened: list[tuple[str, float]], failures: int
) -> None:
    breaker, now = Breaker(failures, pause=10), 0.0
    for what, seconds in happened:
        now += seconds
        if what == "wait":
            breaker.wait(now)
        elif what == "ok":
            breaker.succeeded()
        elif what == "bad":
            breaker.failed(now)
        else:
            breaker.abandoned()
    breaker.abandoned()  # whoever tried has ended
    assert breaker.wait(now + 10) == 0


def test_a_cache_forgets_what_is_old_and_the_oldest_when_it_is_full() -> None:
    cache = Cache[int](size=2, seconds=10)
    cache.put("a", 1, now=0)
    cache.put("b", 2, now=1)
    assert cache.get("a", 9.9) == 1
    cache.put("c", 3, now=9)
    assert [cache.get(key, 9.9) for key in "abc"] == [None, 2, 3]
    assert [cache.get(key, 11) for key in "abc"] == [None, None, 3]
    assert len(cache) == 1
    cache.put("c", 4, now=18)
    assert cache.get("c", 27) == 4


@given(
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20))),
    st.integers(0, 5),
    st.integers(0, 60),
)
def test_a_history_keeps_the_last_whole_exchanges_within_both_bounds(
    said: list[tuple[str, str]], turns: int, size: int
) -> None:
    history = History()
    for question, answer in said:
        history.add(question, answer, turns=turns, size=size)
        kept = history.turns()
        assert len(kept) <= turns
        assert history.bytes == sum(len((one + two).encode()) for one, two in kept) <= size
    assert kept == said[len(said) - len(kept) :] if said else history.turns() == []


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:10 GMT"}, 10),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, None),
        ({"retry-after": "121"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3),
    ],
)
def test_how_long_a_service_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert retry.told(headers, wall=60) == seconds


def test_pauses_double_are_shortened_at_random_and_bounded() -> None:
    assert [retry.pause(attempt, None, 0) for attempt in range(6)] == [0.5, 1, 2, 4, 8, 8]
    assert retry.pause(1000, None, 1) == 6
    assert retry.pause(0, 90, 0.5) == 90


@pytest.mark.parametrize("status", [400, 401, 404, 408, 409, 422, 429, 500, 503, 529])
def test_what_is_worth_another_try(status: int) -> None:
    assert retry.worth_it(status, {}) == (status in (408, 409, 429) or status >= 500)
    assert retry.worth_it(status, {"x-should-retry": "true"})
    assert not retry.worth_it(status, {"x-should-retry": "false"})


def test_a_token_is_used_until_shortly_before_its_end() -> None:
    made = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ED25519"], capture_output=True, text=True, check=True
    )
    signer = Signer(made.stdout, "K", "P")
    first = signer.token(1000)
    assert signer.token(1000 + 809) == first
    assert signer.token(1000 + 810) != first
    assert signer.token(10) != first  # the clock was set back


# Configuration.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"weather__url": ""}, "weather.url: must be https://<your API host>"),
        ({"weather__url": "https://u:p@h"}, "weather.url: must be https://<your API host>"),
        ({"weather__key": ""}, "weather.provider = 'qweather': needs weather.key or weather.jwt_key"),
        ({"weather__jwt_key": "x"}, "weather.provider = 'qweather': needs weather.key or weather.jwt"),
        ({"weather__key": "a\nb"}, "weather.key: holds characters that no key has"),
        (
            {"weather__key": "", "weather__jwt_key": "x"},
            "weather.jwt_key: needs weather.jwt_id and weather.jwt_project",
        ),
        ({"weather__call_timeout": 10}, 'weather.call_timeout = "10s": must be shorter than'),
        ({"weather__timeout": 65}, 'weather.timeout = "65s": must be shorter than handlers.timeout'),
        ({"weather__cache_ttl": 601}, "command line: weather.cache_ttl = 601: must be a duration"),
        ({"chat__url": "api.openai.com"}, "chat.url: must be https://..."),
        ({"chat__url": "https://h/v1?key=1"}, "chat.url: must be https://..."),
        ({"chat__model": ""}, "chat.provider = 'openai': needs chat.model"),
        ({"chat__key": "密"}, "chat.key: holds characters that no key has"),
        ({"handlers__timeout": 60}, 'chat.timeout = "60s": must be shorter than handlers.timeout'),
    ],
)  # fmt: skip
def test_what_a_service_cannot_be_asked_with_is_told_at_the_start(
    flags: dict[str, object], sentence: str
) -> None:
    fake = Fake(openai, url="http://127.0.0.1:9")
    named = weather_flags(fake) | chat_flags(fake) | flags
    with pytest.raises(ConfigError) as caught:
        config.load(
            None, environ={}, flags={key.replace("__", ".", 1): each for key, each in named.items()}
        )
    assert str(caught.value).startswith(sentence)


def test_a_missing_extra_is_told_with_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["cryptography"] = None
from wsgateway import config, providers
from wsgateway.errors import ConfigError
from wsgateway.metrics import Metrics
flags = {"weather.provider": "qweather", "weather.url": "https://h", "weather.jwt_key": "x",
         "weather.jwt_id": "x", "weather.jwt_project": "x"}
try:
    providers.build(config.load(None, environ={}, flags=flags).config, Metrics())
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert "pip install 'wsgateway[crypto]'" in done.stdout, done.stderr


def test_a_gateway_without_services_loads_no_http_client(tmp_path: Path) -> None:
    program = """
import sys
from wsgateway import config, server
from wsgateway.metrics import Metrics
server.build(config.load(None, environ={}, flags={"api.enabled": False}).config, Metrics())
print([name for name in ("aiohttp", "cryptography") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "[]\n", done.stderr


def test_keys_come_from_files_and_credentials_and_are_never_shown(tmp_path: Path) -> None:
    (tmp_path / "weather").write_text("w-secret\n")
    (tmp_path / "weather").chmod(0o600)
    (tmp_path / "chat").write_text("c-secret\n")
    loaded = config.load(
        None,
        environ={
            "WSGATEWAY_WEATHER_KEY_FILE": str(tmp_path / "weather"),
            "WSGATEWAY_CHAT_KEY_FILE": "credential:chat",
            "WSGATEWAY_CHAT_URL": "http://10.0.0.5/v1",
            "CREDENTIALS_DIRECTORY": str(tmp_path),
        },
    )
    assert (loaded.config.weather.key, loaded.config.chat.key) == ("w-secret", "c-secret")
    assert loaded.warnings == ("chat.url is http://: chat.key travels in clear",)
    assert all(
        config.keys()[path].secret for path in ("weather.key", "weather.jwt_key", "chat.key")
    )


EXAMPLES = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/providers.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_documentation_are_configurations(example: str, tmp_path: Path) -> None:
    for key in re.findall(r'_file = "credential:([^"]+)"', example):
        (tmp_path / key).write_text("secret")
    path = tmp_path / "config.toml"
    path.write_text(example)
    loaded = config.load(path, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    sections = tomllib.loads(example)
    assert set(sections) <= {"weather", "chat"}
    for section, keys in sections.items():
        assert getattr(loaded.config, section).provider == keys["provider"]
    if "jwt_key" not in example:
        providers.build(loaded.config, Metrics())


def test_the_documentation_has_examples_of_both_services() -> None:
    named = "".join(EXAMPLES)
    assert all(word in named for word in ('"qweather"', '"v1"', "jwt_key_file", '"openai"'))


# Outbound proxies.


async def test_requests_take_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def through(request: web.Request) -> web.StreamResponse:
        assert request.raw_path.startswith("http://api.example/"), "a proxy sees the whole address"
        return await qweather(request)

    async with Fake(through).running() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "localhost")
        flags = weather_flags(proxy) | {"weather__url": "http://api.example"}
        async with asking(**flags) as (services, _):
            await services.weather.current("北京")
        assert len(proxy.seen) == 2
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        proxy.good = qweather
        async with asking(**weather_flags(proxy)) as (services, _):
            await services.weather.current("北京")
        assert len(proxy.seen) == 4


# A gateway with services.


@pytest.fixture
async def weather() -> AsyncIterator[Fake]:
    async with Fake(qweather).running() as fake:
        yield fake


@pytest.fixture
async def chat() -> AsyncIterator[Fake]:
    async with Fake(openai).running() as fake:
        yield fake


@pytest.fixture
async def gateway(accounts: Accounts, weather: Fake, chat: Fake) -> AsyncIterator[Instance]:
    """A gateway that asks both, in parts where it may."""
    flags = weather_flags(weather) | chat_flags(chat, chat__stream=True)
    async with running_gateway(accounts, **flags) as instance:
        yield instance


WEATHER = {"type": "weather", "message": {"city": "上海"}}
SAY = {"type": "chat_message", "message": "hello"}


async def test_devices_get_weather_and_chat_as_the_protocol_says(gateway: Instance) -> None:
    async with gateway.device() as device:
        answer = await ask(device, WEATHER)
        assert answer["type"] == "weather_response"
        assert answer["data"]["city"] == {"name": "上海"}
        assert answer["data"]["weather"]["now"]["temp"] == "24"
        assert "sample" not in answer["data"]
        answer = await ask(device, SAY)
        assert set(answer) == {"type", "message", "timestamp"}
        assert answer["message"] == "heard hello"


async def received(device: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = orjson.loads(await device.recv())
    return message


async def test_parts_go_to_devices_that_offered_the_subprotocol_and_to_no_others(
    gateway: Instance, chat: Fake
) -> None:
    middle = asyncio.Event()

    async def wait(_: web.Request) -> web.StreamResponse:
        await middle.wait()
        raise AssertionError

    async def in_two(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("one ").encode())
        await middle.wait()
        await response.write((chunk("two") + chunk(finish="stop") + "data: [DONE]\n\n").encode())
        return response

    chat.next(in_two, in_two)
    async with gateway.device(subprotocols=["wsgateway.v1"]) as device:
        await device.send(json.dumps(SAY))
        first = await received(device)
        middle.set()
        assert first.pop("timestamp")
        assert first == {"type": "chat_delta", "seq": 0, "delta": "one "}
        parts = [first["delta"]]
        while (message := await received(device))["type"] == "chat_delta":
            assert message["seq"] == len(parts)
            parts.append(message["delta"])
        assert message["type"] == "chat_response"
        assert message["message"] == "".join(parts) == "one two"
    async with gateway.device() as device:
        assert (await ask(device, SAY))["message"] == "one two"


async def test_a_conversation_lasts_as_long_as_its_connection(
    gateway: Instance, chat: Fake
) -> None:
    async with gateway.device() as one, gateway.device() as other:
        for device in (one, one, other):
            await ask(device, SAY)
    assert [len(request.body["messages"]) for request in chat.seen] == [1, 3, 1]


async def test_nothing_is_kept_for_a_device_that_never_chats(gateway: Instance) -> None:
    async with gateway.device() as device:
        await ask(device, WEATHER)
        (connection,) = gateway.running.instance.listener._connections
        assert connection.history is None
        await ask(device, SAY)
        assert connection.history is not None
    await eventually(lambda: connection.history is None)


async def test_pings_are_answered_while_services_are_slow_and_who_leaves_cancels_its_request(
    gateway: Instance, weather: Fake, chat: Fake
) -> None:
    weather.next(weather.hang)
    chat.next(chat.hang)
    async with gateway.device() as one, gateway.device() as other:
        await one.send(json.dumps(WEATHER))
        await other.send(json.dumps(SAY))
        await eventually(lambda: weather.hanging and chat.hanging)
        for device in (one, other):
            assert (await ask(device, {"type": "ping"}))["type"] == "pong"
    await eventually(lambda: weather.given_up and chat.given_up)


async def test_failures_are_told_and_the_device_stays(
    gateway: Instance, weather: Fake, chat: Fake
) -> None:
    weather.next("failed")
    chat.next("html")
    async with gateway.device() as device:
        answer = await ask(device, WEATHER)
        assert answer["message"] == "Weather query failed: the weather service failed"
        assert answer["code"] == "SERVICE_ERROR"
        long = {"type": "weather", "message": {"city": "京" * 10_000}}
        assert (await ask(device, long))["message"] == (
            "Weather query failed: the name of the city is longer than 64 characters"
        )
        answer = await ask(device, SAY)
        assert answer["message"].startswith("the chat service answered something")
        assert (await ask(device, SAY))["message"] == "heard hello"


async def test_a_drain_lets_a_request_finish_before_its_device_is_sent_away(
    gateway: Instance, chat: Fake
) -> None:
    finish = asyncio.Event()

    async def late(request: web.Request) -> web.StreamResponse:
        await finish.wait()
        return await openai(request)

    chat.next(late)
    async with gateway.device() as asks, gateway.device() as idle:
        await asks.send(json.dumps(SAY))
        await eventually(lambda: chat.seen)
        gateway.stop.set()
        await idle.wait_closed()
        assert idle.close_code == 1012
        finish.set()
        assert (await received(asks))["message"] == "heard hello"
        await asks.wait_closed()
        assert asks.close_code == 1012


async def test_a_drain_does_not_wait_for_a_request_for_ever(accounts: Accounts, chat: Fake) -> None:
    chat.next(chat.hang)
    async with (
        running_gateway(accounts, **chat_flags(chat, drain__grace=0.2)) as gateway,
        gateway.device() as device,
    ):
        await device.send(json.dumps(SAY))
        await eventually(lambda: chat.hanging)
        gateway.stop.set()
        await device.wait_closed()
        assert device.close_code == 1012
    assert chat.given_up == 1


async def test_requests_and_what_they_cost_are_metrics(gateway: Instance) -> None:
    from aiohttp import ClientSession

    async with gateway.device() as device:
        for message in (WEATHER, WEATHER, SAY):
            await ask(device, message)
    async with ClientSession() as session, session.get(f"{gateway.api_url}/metrics") as answer:
        text = await answer.text()
    told = {
        (one.name, *sorted(one.labels.values())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    for wanted, value in (
        (("provider_requests_total", "here", "ok", "qweather"), 2),
        (("provider_seconds_count", "here", "qweather"), 2),
        (("provider_seconds_count", "here", "openai"), 1),
        (("handler_seconds_count", "here", "weather"), 2),
        (("weather_answers_total", "cache", "here"), 1),
        (("chat_tokens_total", "here", "prompt"), 20),
        (("chat_cost_total", "here"), 0),
        (("sent_total", "here", "weather"), 2),
        (("sent_total", "connection_status", "here"), 1),
    ):
        assert told[f"wsgateway_{wanted[0]}", *wanted[1:]] == value, wanted
    assert KEY not in text


async def test_a_stream_to_nobody_ends(gateway: Instance, chat: Fake) -> None:
    chat.next(streamed(chunk("x"), then=chat.hang))
    async with gateway.device(subprotocols=["wsgateway.v1"]) as device:
        await device.send(json.dumps(SAY))
        await received(device)
        await eventually(lambda: chat.hanging)
    await eventually(lambda: chat.given_up)
