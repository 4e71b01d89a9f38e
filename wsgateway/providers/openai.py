"""Chat with any service that speaks OpenAI's chat completions.

Only this module knows their requests and words. What a service answers is an answer to one user:
nothing of it is kept here, and nothing of it but its text reaches a device.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from time import monotonic, time
from typing import Any, Final

import msgspec

from wsgateway import config
from wsgateway.metrics import Metrics
from wsgateway.providers import retry
from wsgateway.providers.breaker import Breaker
from wsgateway.providers.failures import Failure, Outcome, Unusable
from wsgateway.providers.guard import Guard
from wsgateway.providers.history import History
from wsgateway.providers.outbound import Answer, Outbound, Patience, Request
from wsgateway.providers.seats import Seats
from wsgateway.providers.sse import Events

log = logging.getLogger(__name__)

SERVICE: Final = "chat service"
DONE: Final = b"[DONE]"
QUEUE_SHARE: Final = 0.5
"""Share of ``chat.timeout`` that a request may wait for its turn; the rest is for its answer."""

LIMITED_SECONDS: Final = 5.0
"""How long the service is left alone that gets too many requests and does not say how long."""

CHECK_TOKENS: Final = 16
"""Tokens that a check may cost."""

STATUSES: Final = {
    401: Outcome.DENIED,
    402: Outcome.DENIED,
    408: Outcome.UNAVAILABLE,
    409: Outcome.UNAVAILABLE,
    429: Outcome.LIMITED,
}
"""What a status means; other 4xx are about one request (403 too: some services so refuse a text),
from 500 on the service has trouble, and the rest is nothing we know."""

Delta = Callable[[str], object]
"""Takes the next part of an answer; never waits."""


class Usage(msgspec.Struct):
    """What an answer cost in tokens."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Words(msgspec.Struct):
    """What the service says: an answer, or why it gives none."""

    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct):
    """An answer (``message``), or the next part of one (``delta``)."""

    message: Words | None = None
    delta: Words | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A whole answer, or one chunk of a stream; the last chunk may have a usage and no choices."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class Heard:
    """An answer as it comes together."""

    def __init__(self, delta: Delta | None) -> None:
        self._delta = delta
        self._parts: list[str] = []
        self.finish = ""
        self.usage: Usage | None = None
        self.refused = False

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def take(self, completions: list[Completion]) -> None:
        """Add what came at once, and pass it on as one part."""
        fresh = []
        for completion in completions:
            self.usage = completion.usage or self.usage
            for choice in (completion.choices or [])[:1]:
                words = choice.message or choice.delta or Words()
                self.refused = self.refused or bool(words.refusal)
                self.finish = choice.finish_reason or self.finish
                fresh += [words.content or "", words.refusal or ""]
        text = "".join(fresh)
        if text:
            self._parts.append(text)
            if self._delta is not None:
                self._delta(text)


class OpenAIChat:
    """A conversation partner behind HTTP."""

    def __init__(self, settings: config.Chat, outbound: Outbound, metrics: Metrics) -> None:
        """Connect to nothing yet."""
        self._settings = settings
        self._outbound = outbound
        self._metrics = metrics
        self._seats = Seats(settings.concurrency, settings.concurrency_per_user)
        breaker = Breaker(settings.breaker_failures, settings.breaker_pause)
        self._guard = Guard("openai", SERVICE, breaker, metrics)
        self._headers = {"Content-Type": "application/json"}
        if settings.key:
            self._headers["Authorization"] = f"Bearer {settings.key}"

    async def reply(
        self, text: str, *, user_id: int, history: History, delta: Delta | None = None
    ) -> str:
        """The answer to what a user says, within ``chat.timeout``; remembered in the history."""
        question = sayable(text)
        document = self._document(question, user_id, history)
        deadline = monotonic() + self._settings.timeout
        try:
            async with self._seats.taken(user_id, self._settings.timeout * QUEUE_SHARE):
                heard = await self._answer(document, deadline, delta)
        except TimeoutError:
            raise self._guard.counted(Failure(Outcome.BUSY, SERVICE)) from None
        if not heard.refused:
            settings = self._settings
            history.add(
                question, heard.text, turns=settings.history_turns, size=settings.history_bytes
            )
        return heard.text

    async def check(self) -> None:
        """Have the service answer one word. An empty answer is fine, as few tokens are allowed."""
        document = self._document("ping", 0, History())
        document[self._settings.max_tokens_field] = CHECK_TOKENS
        try:
            await self._attempt(document, monotonic() + self._settings.timeout, None)
        except Failure as failure:
            if failure.outcome not in (Outcome.EMPTY, Outcome.DECLINED):
                raise

    def _document(self, question: str, user_id: int, history: History) -> dict[str, Any]:
        settings = self._settings
        messages = [{"role": "system", "content": settings.system}] if settings.system else []
        for asked, answered in history.turns():
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": question})
        document: dict[str, Any] = {
            "model": settings.model,
            "messages": messages,
            "stream": settings.stream,
            settings.max_tokens_field: settings.max_tokens,
        }
        if settings.stream:
            document["stream_options"] = {"include_usage": True}
        if settings.temperature >= 0:
            document["temperature"] = settings.temperature
        if settings.identify_users:
            document["user"] = pseudonym(user_id, settings.key)
        return document

    async def _answer(
        self, document: dict[str, Any], deadline: float, delta: Delta | None
    ) -> Heard:
        """An answer, after as many tries as the policy and the deadline allow. Raises Failure."""
        attempt = 0
        while True:
            try:
                return await self._attempt(document, deadline, delta)
            except Failure as failure:
                pause = retry.pause(attempt, failure.wait, random.random())  # noqa: S311 - spreads
                late = monotonic() + pause >= deadline
                if not failure.retry or attempt >= retry.RETRIES or late:
                    if failure.outcome is Outcome.LIMITED:
                        self._guard.rest(failure.wait or LIMITED_SECONDS)
                    raise
            attempt += 1
            await asyncio.sleep(pause)

    async def _attempt(
        self, document: dict[str, Any], deadline: float, delta: Delta | None
    ) -> Heard:
        settings, left = self._settings, max(0.0, deadline - monotonic())
        request = Request(
            service=SERVICE,
            method="POST",
            url=settings.url.rstrip("/") + "/chat/completions",
            headers=self._headers,
            patience=Patience(settings.connect_timeout, settings.first_byte_timeout, left),
            most=settings.answer_bytes,
            body=msgspec.json.encode(document),
        )
        with self._guard.request():
            async with self._outbound.ask(request) as answer:
                heard = await understood(answer, delta)
                self._count(heard.usage)
                return satisfying(heard)

    def _count(self, usage: Usage | None) -> None:
        """Count tokens, and what they cost at the prices of now: a reload may change these."""
        if usage is None:
            return
        tokens, settings = self._metrics.chat_tokens, self._settings
        prompt, completion = max(0, usage.prompt_tokens or 0), max(0, usage.completion_tokens or 0)
        tokens["prompt"] += prompt
        tokens["completion"] += completion
        self._metrics.chat_cost_micros += round(
            prompt * settings.prompt_price + completion * settings.completion_price
        )


async def understood(answer: Answer, delta: Delta | None) -> Heard:
    """What a service answers, in one piece or as a stream. Raises Failure."""
    if answer.status != 200:
        raise _failure(answer.status, answer.headers)
    heard = Heard(delta)
    if answer.kind == "text/event-stream":
        await _listen(answer, heard)
    elif "json" in answer.kind:
        heard.take([_decoded(await answer.body())])
    else:
        raise Failure(Outcome.GARBAGE, SERVICE)
    return heard


async def _listen(answer: Answer, heard: Heard) -> None:
    """Read a stream to its end. What fails once it began is not tried again."""
    events, found = Events(), list[bytes]()
    try:
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                found = events.feed(piece)
                heard.take([_decoded(event) for event in found if event != DONE])
                if DONE in found:
                    break
    except Failure as failure:
        failure.retry = False
        raise
    if DONE in found or heard.finish:
        await answer.finish()
        return
    raise Failure(Outcome.BROKEN, SERVICE)


def satisfying(heard: Heard) -> Heard:
    """An answer that says something. Raises Failure for one that does not."""
    if not heard.text.strip():
        declined = heard.finish == "content_filter"
        raise Failure(Outcome.DECLINED if declined else Outcome.EMPTY, SERVICE)
    return heard


def sayable(text: str) -> str:
    """What a user says, without control characters. Raises Unusable if that is nothing."""
    said = "".join(
        character for character in text if character.isprintable() or character in "\n\t"
    )
    if not said.strip():
        raise Unusable("the chat message is empty")
    return said


def pseudonym(user_id: int, key: str) -> str:
    """A name for a user that the service cannot trace back, as it cannot count users either."""
    return hmac.new(key.encode(), str(user_id).encode(), hashlib.sha256).hexdigest()[:32]


def _decoded(body: bytes) -> Completion:
    try:
        completion = msgspec.json.decode(body, type=Completion)
    except (ValueError, RecursionError):
        raise Failure(Outcome.GARBAGE, SERVICE) from None
    if completion.error:
        log.warning("openai answered an error in a good answer")
        raise Failure(Outcome.UNAVAILABLE, SERVICE)
    return completion


def _failure(status: int, headers: Mapping[str, str]) -> Failure:
    if status in STATUSES:
        outcome = STATUSES[status]
    elif status >= 500:
        outcome = Outcome.UNAVAILABLE
    else:
        outcome = Outcome.REJECTED if status >= 400 else Outcome.GARBAGE
    log.warning("openai answered status=%s", status)
    again = retry.worth_it(status, headers)
    return Failure(outcome, SERVICE, wait=retry.told(headers, time()), retry=again)
