"""The weather of a real service: what is asked, what a device gets, and what it hears of failures."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.conftest import eventually
from tests.services import (
    KEY,
    TROUBLES,
    V7,
    Fake,
    answering,
    asking,
    packed,
    qweather,
    weather_flags,
)
from wsgateway.errors import ConfigError, ServiceError
from wsgateway.metrics import Metrics
from wsgateway.providers import Services


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    async with Fake(qweather).running() as service:
        yield service


async def failure(services: Services, city: str = "北京") -> str:
    """What a device hears in place of a weather."""
    with pytest.raises(ServiceError) as caught:
        await services.weather.current(city)
    return str(caught.value)


def outcomes(metrics: Metrics) -> dict[str, int]:
    return {outcome: number for (_, outcome), number in metrics.provider_requests.items()}


async def test_a_city_is_looked_up_and_its_weather_has_the_shape_that_devices_know(
    fake: Fake,
) -> None:
    async with asking(**weather_flags(fake)) as (services, metrics):
        assert await services.weather.current("北 京, CN") == {
            "city": {"name": "北 京, CN"},
            "weather": {"now": V7, "updateTime": "2020-06-30T22:00+08:00"},
        }
    look_up, now = fake.seen
    assert look_up.path == (
        "/geo/v2/city/lookup?location=%E5%8C%97%20%E4%BA%AC%2C%20CN&number=1&lang=zh"
    )
    assert now.path == "/v7/weather/now?location=101010100&lang=zh"
    for request in fake.seen:
        assert request.headers["x-qw-api-key"] == KEY
        assert "authorization" not in request.headers
        assert request.headers["accept-encoding"] == "gzip"
    assert outcomes(metrics) == {"ok": 2}


async def test_the_newer_call_is_mapped_to_the_same_shape(fake: Fake) -> None:
    async with asking(**weather_flags(fake, weather__api="v1", weather__lang="")) as (services, _):
        answer = await services.weather.current("Beijing")
    updated = answer["weather"].pop("updateTime")
    assert updated.endswith("+00:00")
    assert answer == {
        "city": {"name": "Beijing"},
        "weather": {
            "now": {
                "temp": "24", "feelsLike": "26", "icon": "104", "text": "Cloudy", "windDir": "SE",
                "windSpeed": "9", "humidity": "72", "precip": "0.0", "pressure": "1003", "vis": "16",
            }
        },
    }  # fmt: skip
    assert fake.seen[1].path == "/weather/v1/current/39.90/116.41?localTime=true"


async def test_an_answer_is_given_again_for_a_while_however_the_city_is_written(
    fake: Fake,
) -> None:
    async with asking(**weather_flags(fake)) as (services, metrics):
        first = await services.weather.current("New  York")
        first["weather"]["now"].clear()  # the caller's own
        again = await services.weather.current(" new york ")
        assert again["weather"]["now"] == V7
        assert len(fake.seen) == 2
        assert metrics.weather_answers == {"service": 1, "cache": 1}
    async with asking(**weather_flags(fake, weather__cache_ttl=0)) as (services, _):
        for _ in range(2):
            await services.weather.current("北京")
        assert len(fake.seen) == 6


async def test_what_the_look_up_said_is_never_kept(fake: Fake) -> None:
    fake.next(qweather, "failed")
    async with asking(**weather_flags(fake)) as (services, _):
        await failure(services)
        await services.weather.current("北京")
    assert [request.path.partition("?")[0] for request in fake.seen] == [
        "/geo/v2/city/lookup", "/v7/weather/now", "/geo/v2/city/lookup", "/v7/weather/now",
    ]  # fmt: skip


async def test_many_who_ask_for_a_city_share_a_request_and_one_who_leaves_does_not_end_it(
    fake: Fake,
) -> None:
    open_now = asyncio.Event()

    async def late(request: Any) -> Any:
        await open_now.wait()
        return await qweather(request)

    fake.next(late)
    async with asking(**weather_flags(fake)) as (services, metrics):
        tasks = [asyncio.create_task(services.weather.current("北京")) for _ in range(50)]
        await eventually(lambda: fake.seen)
        tasks[0].cancel()
        await asyncio.wait({tasks[0]})
        open_now.set()
        answers = await asyncio.gather(*tasks[1:])
        assert len(fake.seen) == 2
        assert all(answer == answers[0] for answer in answers)
        assert metrics.weather_answers == {"service": 1, "shared": 49}


async def test_a_request_ends_when_the_last_who_waits_for_it_has_left(fake: Fake) -> None:
    fake.next(fake.hang)
    async with asking(**weather_flags(fake)) as (services, metrics):
        tasks = [asyncio.create_task(services.weather.current("北京")) for _ in range(2)]
        await eventually(lambda: fake.hanging)
        for task in tasks:
            task.cancel()
        await eventually(lambda: fake.given_up)
        assert outcomes(metrics) == {"cancelled": 1}
        await services.weather.current("北京")  # and does not hinder the next one


NOT_UNDERSTOOD = "the weather service answered something that cannot be understood"
BROKE = "the connection to the weather service broke"
TOO_LARGE = "the answer of the weather service is too large"
SAYS = {
    "dropped": BROKE,
    "cut": BROKE,
    "huge": TOO_LARGE,
    "bomb": TOO_LARGE,
    "failed": "the weather service failed",
    "limited": "the weather service gets too many requests: try again in 1 s",
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("call", [0, 1])
async def test_each_way_to_fail_ends_in_a_sentence_and_is_not_tried_again(
    fake: Fake, trouble: str, call: int
) -> None:
    # The HTTP client sends a GET once more whose connection was closed before any answer.
    times = 2 if trouble == "dropped" else 1
    fake.next(*[qweather] * call, *[trouble] * times)
    async with asking(**weather_flags(fake)) as (services, _):
        assert await failure(services) == SAYS.get(trouble, NOT_UNDERSTOOD)
        assert len(fake.seen) == call + times


async def test_no_answer_in_time_and_nobody_there_are_told(fake: Fake) -> None:
    quick = {"weather__timeout": 0.4, "weather__call_timeout": 0.2}
    fake.next(fake.hang)
    async with asking(**weather_flags(fake, **quick)) as (services, _):
        assert await failure(services) == "the weather service did not answer in time"
        await eventually(lambda: fake.given_up)
    nobody = weather_flags(fake) | {"weather__url": "http://127.0.0.1:9"}
    async with asking(**nobody) as (services, metrics):
        assert await failure(services) == "the weather service cannot be reached"
        assert outcomes(metrics) == {"unreachable": 1}


@pytest.mark.parametrize(
    "said",
    [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, b"\0" * 5000, b""],
    ids=["ssh", "long header", "zeros", "nothing"],
)
async def test_what_answers_and_is_no_web_server_is_told(fake: Fake, said: bytes) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, asking(**weather_flags(fake)) as (services, _):
        assert await failure(services) in (NOT_UNDERSTOOD, BROKE)


def old(code: str) -> Any:
    return answering(json.dumps({"code": code}))


def new(status: int, title: str) -> Any:
    problem = {"error": {"status": status, "type": "https://x/#problem", "title": title}}
    return answering(json.dumps(problem), status, Content_Type="application/problem+json")


NO_CITY = "the weather service knows no such city"
NO_KEY = "the weather service does not accept this gateway's key or plan"
NOT_ACCEPTED = "the weather service does not accept the request"


@pytest.mark.parametrize(
    ("reply", "sentence", "rests"),
    [
        (old("404"), NO_CITY, False),
        (old("204"), NO_CITY, False),
        (answering('{"code":"200","location":[]}'), NO_CITY, False),
        (new(400, "NO SUCH LOCATION"), NO_CITY, False),
        (new(404, "Not Found"), NO_CITY, False),
        (old("400"), NOT_ACCEPTED, False),
        (new(400, "INVALID PARAMETER"), NOT_ACCEPTED, False),
        (old("401"), NO_KEY, True),
        (old("402"), NO_KEY, True),
        (new(401, "UNAUTHORIZED"), NO_KEY, True),
        (new(403, "NO CREDIT"), NO_KEY, True),
        (old("429"), "the weather service gets too many requests", True),
        (new(429, "TOO MANY REQUESTS"), "the weather service gets too many requests", True),
        (old("500"), "the weather service failed", False),
        (old("soon"), NOT_UNDERSTOOD, False),
    ],
)
async def test_errors_of_both_styles_are_told_and_those_about_the_key_stop_all_requests(
    fake: Fake, reply: Any, sentence: str, rests: bool
) -> None:
    fake.next(reply)
    async with asking(**weather_flags(fake)) as (services, metrics):
        assert await failure(services) == sentence
        if rests:
            left_alone = await failure(services)
            assert left_alone.startswith("the weather service failed and is left alone for a while")
            assert len(fake.seen) == 1
            assert metrics.provider_pauses == {"qweather": 1}
        else:
            await services.weather.current("上海")


async def test_a_service_that_fails_again_and_again_is_left_alone_and_then_tried_once(
    fake: Fake,
) -> None:
    fake.next(*["failed"] * 4)
    flags = weather_flags(fake, weather__breaker_failures=3, weather__breaker_pause=0.1)
    async with asking(**flags) as (services, metrics):
        for _ in range(3):
            assert await failure(services) == "the weather service failed"
        assert (await failure(services)).endswith("left alone for a while: try again in 1 s")
        assert len(fake.seen) == 3
        said = "paused"
        while said != "the weather service failed":
            said = await failure(services)
            await asyncio.sleep(0)
        assert len(fake.seen) == 4
        assert metrics.provider_pauses == {"qweather": 2}
        async with asyncio.timeout(5):
            while len(fake.seen) < 6:
                try:
                    await services.weather.current("北京")
                except ServiceError:
                    await asyncio.sleep(0)
        assert outcomes(metrics)["ok"] == 2


async def test_no_city_can_make_the_service_be_left_alone(fake: Fake) -> None:
    fake.next(*[old("404")] * 20)
    async with asking(**weather_flags(fake)) as (services, _):
        for number in range(20):
            assert await failure(services, f"no such city {number}") == NO_CITY
        await services.weather.current("北京")


@pytest.mark.parametrize(
    ("city", "sentence"),
    [
        ("京" * 10_000, "the name of the city is longer than 64 characters"),
        ("", "the name of the city is empty"),
        (" \u3000", "the name of the city is empty"),
        ("北\0京", "the name of the city holds control characters"),
        ("a\r\nX-Header: b", "the name of the city holds control characters"),
        ("Par\u202eis", "the name of the city holds control characters"),
        ("\ufdfa" * 64, "the name of the city is too short or too long"),
        ("x", "the name of the city is too short or too long"),
    ],
    ids=["long", "empty", "blank", "nul", "header", "direction", "grows", "short"],
)
async def test_what_is_no_city_is_told_without_a_request(
    fake: Fake, city: str, sentence: str
) -> None:
    async with asking(**weather_flags(fake)) as (services, _):
        assert await failure(services, city) == sentence
    assert fake.seen == []


async def test_a_city_cannot_reach_another_path(fake: Fake) -> None:
    async with asking(**weather_flags(fake)) as (services, _):
        await services.weather.current("../../v7?key=1&x=#/%2e%2e")
    assert fake.seen[0].path == (
        "/geo/v2/city/lookup?location=..%2F..%2Fv7%3Fkey%3D1%26x%3D%23%2F%252e%252e&number=1&lang=zh"
    )


async def test_too_many_cities_at_once_wait_and_are_then_told(fake: Fake) -> None:
    fake.next(fake.hang)
    flags = weather_flags(
        fake, weather__concurrency=1, weather__timeout=30, weather__call_timeout=29.8
    )
    async with asking(**flags) as (services, metrics):
        hanging = asyncio.create_task(services.weather.current("北京"))
        await eventually(lambda: fake.hanging)
        assert await failure(services, "上海") == "too many others are asking the weather service"
        assert outcomes(metrics) == {"busy": 1}
        hanging.cancel()
        await eventually(lambda: fake.given_up)
        await services.weather.current("上海")


async def test_a_check_asks_the_service_past_the_cache(fake: Fake) -> None:
    async with asking(**weather_flags(fake)) as (services, _):
        for _ in range(2):
            await services.weather.check()
        assert len(fake.seen) == 4
        fake.next(old("401"))
        with pytest.raises(ServiceError, match="key or plan"):
            await services.weather.check()


async def test_the_key_is_in_no_log_and_no_error(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.next(answering(json.dumps({"code": f"401 {KEY}"})), *TROUBLES.values())
    async with asking(**weather_flags(fake, weather__breaker_failures=99)) as (services, _):
        for _ in range(9):
            assert KEY not in await failure(services)
    assert KEY not in caplog.text


def pem(key: Any) -> str:
    written: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return written.decode()


async def test_a_signed_token_takes_the_place_of_the_key(fake: Fake) -> None:
    key = Ed25519PrivateKey.generate()
    flags = weather_flags(fake) | {
        "weather__key": "", "weather__jwt_key": pem(key), "weather__jwt_id": "K1",
        "weather__jwt_project": "P1",
    }  # fmt: skip
    async with asking(**flags) as (services, _):
        await services.weather.current("北京")
    first, second = (request.headers["authorization"] for request in fake.seen)
    assert first == second
    assert "x-qw-api-key" not in fake.seen[0].headers
    head, payload, signature = first.removeprefix("Bearer ").split(".")
    key.public_key().verify(unpadded(signature), f"{head}.{payload}".encode())
    assert json.loads(unpadded(head)) == {"alg": "EdDSA", "kid": "K1"}
    claims = json.loads(unpadded(payload))
    assert claims["sub"] == "P1"
    assert claims["exp"] - claims["iat"] == 900


def unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


async def test_a_private_key_that_is_none_is_told_at_the_start(fake: Fake) -> None:
    flags = weather_flags(fake) | {
        "weather__key": "", "weather__jwt_key": "secret words", "weather__jwt_id": "K1",
        "weather__jwt_project": "P1",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no Ed25519 private key") as caught:
        async with asking(**flags):
            pass
    assert "secret words" not in str(caught.value)


async def test_values_of_any_length_or_kind_are_cut_or_refused(fake: Fake) -> None:
    long = {"temp": "2" * 1000, "text": "x" * 1000, "icon": None, "other": "y" * 1000}

    async def now(_: Any) -> Any:
        return packed({"code": "200", "updateTime": "", "now": long})

    fake.next(qweather, now)
    async with asking(**weather_flags(fake)) as (services, _):
        answer = await services.weather.current("北京")
        assert answer["weather"]["now"] == {"temp": "2" * 64, "text": "x" * 64, "icon": ""}
        for wrong in ({}, {"temp": "", "text": "x"}, {"temp": 24, "text": "x"}, []):
            fake.next(qweather, answering(json.dumps({"code": "200", "now": wrong})))
            assert await failure(services, "上海") == NOT_UNDERSTOOD
