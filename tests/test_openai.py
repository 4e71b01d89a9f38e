"""Chat with a real service: what is asked, what a device gets, and what it hears of failures."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import eventually
from tests.services import (
    KEY,
    LAST,
    TROUBLES,
    Fake,
    abort,
    answering,
    asking,
    chat_flags,
    chunk,
    completion,
    openai,
    streamed,
)
from wsgateway.errors import ServiceError
from wsgateway.metrics import Metrics
from wsgateway.providers import History, Services
from wsgateway.providers.sse import Events

AT_ONCE = answering('{"error":{"message":"wait"}}', 429, retry_after_ms="1")
"""Too many requests, and worth another try in a millisecond."""

BROKE = "the connection to the chat service broke"
NOT_UNDERSTOOD = "the chat service answered something that cannot be understood"


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    async with Fake(openai).running() as service:
        yield service


async def say(services: Services, text: str = "hi", user_id: int = 7, **more: Any) -> str:
    return await services.chat.reply(text, user_id=user_id, **{"history": History(), **more})


async def failure(services: Services, text: str = "hi", **more: Any) -> str:
    """What a device hears in place of an answer."""
    with pytest.raises(ServiceError) as caught:
        await say(services, text, **more)
    return str(caught.value)


def outcomes(metrics: Metrics) -> dict[str, int]:
    return {outcome: number for (_, outcome), number in metrics.provider_requests.items()}


async def test_a_message_is_answered_and_its_tokens_and_price_are_counted(fake: Fake) -> None:
    prices = {"chat__prompt_price": 0.15, "chat__completion_price": 0.6}
    flags = chat_flags(fake, chat__system="Be brief.", chat__max_tokens=99, **prices)
    async with asking(**flags) as (services, metrics):
        assert await say(services, "你好") == "heard 你好"
        assert outcomes(metrics) == {"ok": 1}
        assert metrics.chat_tokens == {"prompt": 20, "completion": 5}
        assert metrics.chat_cost_micros == 6  # 20 x 0.15 + 5 x 0.6
    request = fake.seen[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "small",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "你好"},
        ],
        "stream": False,
        "max_tokens": 99,
    }


async def test_what_services_differ_in_is_configuration(fake: Fake) -> None:
    flags = chat_flags(fake) | {
        "chat__key": "", "chat__max_tokens_field": "max_completion_tokens",
        "chat__temperature": 0.5, "chat__identify_users": True, "chat__stream": True,
    }  # fmt: skip
    async with asking(**flags) as (services, _):
        await say(services)
        await say(services, user_id=8)
    assert "authorization" not in fake.seen[0].headers
    users = [request.body.pop("user") for request in fake.seen]
    assert len(set(users)) == 2
    assert all(len(user) == 32 for user in users)
    assert fake.seen[0].body == {
        "model": "small",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 1024,
        "temperature": 0.5,
    }


async def test_the_service_is_reminded_of_what_was_said_within_bounds(fake: Fake) -> None:
    history = History()
    async with asking(**chat_flags(fake, chat__history_turns=2)) as (services, _):
        for word in "abcd":
            await say(services, word, history=history)
        fake.next(completion(None), completion(None, refusal="I cannot."))
        assert await failure(services, "e", history=history) == "the chat service answered nothing"
        assert await say(services, "f", history=history) == "I cannot."
    said = [message["content"] for message in fake.seen[3].body["messages"]]
    assert said == ["b", "heard b", "c", "heard c", "d"]
    assert history.turns() == [("c", "heard c"), ("d", "heard d")]  # neither failures nor refusals


# Streams.


async def test_parts_are_passed_on_as_they_come_and_make_up_the_answer(fake: Fake) -> None:
    parts: list[str] = []
    async with asking(**chat_flags(fake, chat__stream=True)) as (services, metrics):
        answer = await say(services, "a long question", delta=parts.append)
        assert answer == "".join(parts) == "heard a long question"
        assert metrics.chat_tokens == {"prompt": 20, "completion": 5}
        assert await say(services, "without parts") == "heard without parts"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
async def test_a_stream_that_is_cut_anywhere_is_understood(fake: Fake, size: int) -> None:
    text = chunk("你") + ": comment\r\n\r\n" + chunk("好") + chunk(finish="stop") + LAST
    raw = text.encode()
    fake.next(streamed(*[raw[at : at + size] for at in range(0, len(raw), size)]))
    async with asking(**chat_flags(fake, chat__stream=True)) as (services, metrics):
        assert await say(services) == "你好"
        assert metrics.chat_tokens["completion"] == 5


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            streamed(chunk("half"), 'data: {"error":{"message":"sk-very-secret-1234"}}\n\n'),
            "the chat service failed",
        ),
        (streamed(chunk("half"), then=abort), BROKE),
        (streamed(chunk("half")), BROKE),
        (streamed(chunk("half"), "data: {\n\n"), NOT_UNDERSTOOD),
        (streamed(chunk("half"), "data: \xff\n\n".encode("latin-1")), NOT_UNDERSTOOD),
        (
            streamed(*[chunk("x" * 60_000)] * 20),
            "the answer of the chat service is too large",
        ),
    ],
    ids=["error", "dropped", "ended", "no json", "no utf-8", "large"],
)
async def test_what_fails_in_mid_stream_is_told_and_not_tried_again(
    fake: Fake, reply: Any, sentence: str
) -> None:
    fake.next(reply)
    history = History()
    async with asking(**chat_flags(fake, chat__stream=True)) as (services, _):
        assert await failure(services, history=history, delta=lambda _: None) == sentence
    assert len(fake.seen) == 1
    assert history.turns() == []


async def test_a_service_that_cannot_stream_is_understood_as_well(fake: Fake) -> None:
    fake.next(completion("whole"))
    parts: list[str] = []
    async with asking(**chat_flags(fake, chat__stream=True)) as (services, _):
        assert await say(services, delta=parts.append) == "whole"
    assert parts == ["whole"]


async def test_the_connection_of_a_stream_is_used_again(fake: Fake) -> None:
    ports = set()

    async def note(request: Any) -> Any:
        ports.add(request.transport.get_extra_info("peername")[1])
        return await openai(request)

    fake.next(*[note] * 3)
    async with asking(**chat_flags(fake, chat__stream=True)) as (services, _):
        for _ in range(3):
            await say(services)
    assert len(ports) == 1


# Failures.


@pytest.mark.parametrize(
    ("trouble", "sentence", "tries"),
    [
        ("dropped", BROKE, 3),
        ("cut", BROKE, 3),
        ("failed", "the chat service failed", 3),
        ("huge", "the answer of the chat service is too large", 1),
        ("bomb", "the answer of the chat service is too large", 1),
        *[
            (trouble, NOT_UNDERSTOOD, 1)
            for trouble in ("no gzip", "brotli", "html", "no json", "deep", "other shape", "redirect")
        ],
    ],
)  # fmt: skip
async def test_each_way_to_fail_ends_in_a_sentence_after_the_tries_that_are_worth_it(
    fake: Fake, trouble: str, sentence: str, tries: int
) -> None:
    fake.next(*[TROUBLES[trouble]] * tries)
    async with asking(**chat_flags(fake)) as (services, _):
        assert await failure(services) == sentence
        assert len(fake.seen) == tries
        assert await say(services) == "heard hi"


@pytest.mark.parametrize(
    ("status", "headers", "sentence", "tries"),
    [
        (400, {}, "the chat service does not accept the request", 1),
        (403, {}, "the chat service does not accept the request", 1),
        (401, {}, "the chat service does not accept this gateway's key or plan", 1),
        (402, {}, "the chat service does not accept this gateway's key or plan", 1),
        (409, {"retry_after_ms": "1"}, "the chat service failed: try again in 1 s", 3),
        (429, {"retry_after_ms": "1"}, "the chat service gets too many requests: try again in 1 s", 3),
        (429, {"retry_after": "90"}, "the chat service gets too many requests: try again in 90 s", 1),
        (503, {"x_should_retry": "false"}, "the chat service failed", 1),
        (400, {"x_should_retry": "true", "retry_after_ms": "1"},
         "the chat service does not accept the request: try again in 1 s", 3),
    ],
)  # fmt: skip
async def test_a_status_decides_what_is_said_and_whether_it_is_tried_again(
    fake: Fake, status: int, headers: dict[str, str], sentence: str, tries: int
) -> None:
    body = json.dumps({"error": {"message": f"wrong key {KEY}", "type": "x", "code": None}})
    fake.next(*[answering(body, status, **headers)] * tries)
    async with asking(**chat_flags(fake)) as (services, _):
        assert await failure(services) == sentence
        assert len(fake.seen) == tries


async def test_a_try_that_succeeds_answers(fake: Fake) -> None:
    fake.next(AT_ONCE, AT_ONCE)
    async with asking(**chat_flags(fake)) as (services, metrics):
        assert await say(services) == "heard hi"
        assert outcomes(metrics) == {"limited": 2, "ok": 1}


async def test_a_service_that_asks_to_wait_longer_than_a_device_does_is_left_alone(
    fake: Fake,
) -> None:
    fake.next(answering("{}", 429, Retry_After="100"))
    async with asking(**chat_flags(fake)) as (services, metrics):
        await failure(services)
        assert (await failure(services)).endswith("left alone for a while: try again in 100 s")
        assert len(fake.seen) == 1
        assert metrics.provider_pauses == {"openai": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_silence_is_given_up(fake: Fake, stream: bool) -> None:
    fake.next(streamed(chunk("half"), then=fake.hang) if stream else fake.hang)
    flags = chat_flags(fake, chat__stream=stream, chat__first_byte_timeout=0.2)
    async with asking(**flags) as (services, metrics):
        assert await failure(services) == "the chat service did not answer in time"
        await eventually(lambda: fake.given_up)
        assert outcomes(metrics) == {"timeout": 1}


async def test_an_answer_that_comes_too_slowly_is_given_up(fake: Fake) -> None:
    fake.next(streamed(*[": keep-alive\n\n"] * 100, then=fake.hang))
    async with asking(**chat_flags(fake, chat__stream=True, chat__timeout=0.3)) as (services, _):
        assert await failure(services) == "the chat service did not answer in time"


async def test_who_leaves_cancels_the_request(fake: Fake) -> None:
    fake.next(fake.hang)
    async with asking(**chat_flags(fake)) as (services, metrics):
        task = asyncio.create_task(say(services))
        await eventually(lambda: fake.hanging)
        task.cancel()
        await eventually(lambda: fake.given_up)
        assert outcomes(metrics) == {"cancelled": 1}
        assert await say(services) == "heard hi"


async def test_a_user_has_one_request_at_a_time_and_all_have_so_many(fake: Fake) -> None:
    fake.next(*[fake.hang] * 3)
    flags = chat_flags(fake, chat__concurrency=2, chat__timeout=20)
    async with asking(**flags) as (services, _):
        tasks = [asyncio.create_task(say(services, user_id=user)) for user in (1, 1, 2, 3)]
        await eventually(lambda: fake.hanging == 2)
        assert len(fake.seen) == 2
        tasks[0].cancel()  # then the next in line, of whatever user, has its turn
        await eventually(lambda: len(fake.seen) == 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(services.chat._seats) == 0  # type: ignore[attr-defined]


async def test_who_waits_too_long_for_a_turn_is_told(fake: Fake) -> None:
    fake.next(fake.hang)
    async with asking(**chat_flags(fake, chat__timeout=0.4)) as (services, _):
        hanging = asyncio.create_task(say(services))
        await eventually(lambda: fake.hanging)
        assert await failure(services) == "too many others are asking the chat service"
        hanging.cancel()
        await asyncio.wait({hanging})


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (completion(""), "the chat service answered nothing"),
        (completion(" \n"), "the chat service answered nothing"),
        (answering('{"choices":[]}'), "the chat service answered nothing"),
        (answering("{}"), "the chat service answered nothing"),
        (completion(None, "tool_calls", tool_calls=[]), "the chat service answered nothing"),
        (completion(None, "content_filter"), "the chat service declines to answer this"),
        (answering('{"error":{"message":"x"}}'), "the chat service failed"),
    ],
)
async def test_an_answer_without_words_is_told(fake: Fake, reply: Any, sentence: str) -> None:
    fake.next(reply)
    async with asking(**chat_flags(fake)) as (services, _):
        assert await failure(services) == sentence


async def test_a_message_without_words_is_told_without_a_request(fake: Fake) -> None:
    async with asking(**chat_flags(fake)) as (services, _):
        for text in ("", " \n", "\0\x1b\u200b"):
            assert await failure(services, text) == "the chat message is empty"
        assert fake.seen == []
        assert await say(services, "a\0b\tc\nd\x1b") == "heard ab\tc\nd"


async def test_a_check_costs_few_tokens_and_takes_an_empty_answer(fake: Fake) -> None:
    fake.next(completion("", "length"))
    async with asking(**chat_flags(fake)) as (services, _):
        await services.chat.check()
        assert fake.seen[0].body["max_tokens"] == 16
        fake.next(answering("{}", 401))
        with pytest.raises(ServiceError, match="key or plan"):
            await services.chat.check()


async def test_the_key_is_in_no_log_and_no_error(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.next(answering(json.dumps({"error": {"message": KEY}}), 400, reason=KEY))
    fake.next("html", "no json", answering(json.dumps({"error": {"message": KEY}})), "dropped")
    async with asking(**chat_flags(fake)) as (services, _):
        for _ in range(4):
            assert KEY not in await failure(services)
        await say(services)
    assert KEY not in caplog.text


# The format of the stream, without a loop.


def fed(raw: bytes, cuts: list[int]) -> list[bytes]:
    events, found = Events(), []
    edges = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    for start, end in itertools.pairwise(edges):
        found += events.feed(raw[start:end])
    return found


ends = st.sampled_from(["\n", "\r\n", "\r"])
texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(texts, max_size=5), ends, st.booleans(), st.lists(st.integers(0, 500), max_size=9))
def test_events_are_the_same_wherever_the_stream_is_cut(
    data: list[str], end: str, mark: bool, cuts: list[int]
) -> None:
    text = "\ufeff" if mark else ""
    for each in data:
        text += f": comment{end}event: x{end}data: {each}{end}{end}"
    assert fed(text.encode(), cuts) == [each.encode() for each in data]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("data:a\n\n", ["a"]),
        ("data:  a\n\n", [" a"]),
        ("data: a\ndata: b\n\n", ["a\nb"]),
        ("data\n\n", [""]),
        ("data: a", []),
        ("data: a\n", []),
        ("\n\n\n", []),
        ("id: 1\nretry: 5\n\n", []),
        ("datax: a\n\n", []),
    ],
)
def test_events_are_read_as_the_standard_says(text: str, events: list[str]) -> None:
    assert fed(text.encode(), []) == [event.encode() for event in events]
