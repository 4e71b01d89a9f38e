"""The instances of one gateway: which are alive, and how they ask each other.

Only this module knows the words on an instance's own channel. It knows neither sockets nor SQL nor
Redis commands. Without a mirror this instance is the only one, and answers itself.

    {"type": "receipts", "from", "receipts": [...]}       what became of messages, see `sends`
    {"type": "question", "from", "id", "question", "about": {...}}
    {"type": "answer", "from", "id", "answer": {...}}
    {"type": "hello", "from"}                             it is here too: said to who is new
    {"type": "bye", "from"}                               it stops
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol

import orjson

from wsgateway.metrics import Metrics

log = logging.getLogger(__name__)

ALIVE_SECONDS: Final = 10.0
"""How long an instance counts as alive after its last beat, of which there is one every 2 s."""

MAX_INSTANCES: Final = 100
"""Instances told apart; further names are not believed."""

MAX_QUESTIONS: Final = 100
"""Questions of others answered at once; further ones stay unanswered and their askers are told."""

Answer = dict[str, Any]
Answerer = Callable[[Mapping[str, Any]], Awaitable[Answer]]


class Post(Protocol):
    """The way to other instances' own channels."""

    @property
    def is_settled(self) -> bool:
        """Whether it is known which other instances there are."""
        ...

    def tell(self, name: str, data: bytes) -> object: ...


class Answers(NamedTuple):
    """What the instances answered, by name, and whether all did."""

    by_instance: dict[str, Answer]
    complete: bool


class _Question(NamedTuple):
    missing: set[str]
    answers: dict[str, Answer]
    answered: asyncio.Future[None]


class Cluster:
    """This instance among the others."""

    def __init__(self, name: str, post: Post | None, metrics: Metrics) -> None:
        self.name = name
        self._post = post
        self._metrics = metrics
        self._beats: dict[str, float] = {}
        self._answerers: dict[str, Answerer] = {}
        self._questions: dict[str, _Question] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_reunion: Callable[[], None] = lambda: None
        """Called when the others can be asked again after they could not."""
        self.on_receipts: Callable[[str, list[Any]], None] = lambda _name, _receipts: None

    @property
    def others(self) -> list[str]:
        """The other instances that are alive, by name."""
        limit = monotonic() - ALIVE_SECONDS
        return sorted(name for name, at in self._beats.items() if at > limit)

    def answer(self, question: str, answerer: Answerer) -> None:
        """Say who answers a question on this instance."""
        self._answerers[question] = answerer

    async def ask(self, question: str, about: Mapping[str, Any], seconds: float) -> Answers:
        """Ask every instance, this one too; what those answered who did within so many seconds.

        Cancelling is safe: the others then answer in vain.
        """
        others = self.others
        asked = _Question(set(others), {}, asyncio.get_running_loop().create_future())
        question_id = secrets.token_hex(8)
        if others:
            self._questions[question_id] = asked
            word = {"type": "question", "id": question_id, "question": question, "about": about}
            for name in others:
                self.tell(name, word)
        try:
            own = await self._answerers[question](about)
            if asked.missing:
                await asyncio.wait({asked.answered}, timeout=seconds)
        finally:
            self._questions.pop(question_id, None)
        is_settled = self._post is None or self._post.is_settled
        return Answers({self.name: own, **asked.answers}, is_settled and not asked.missing)

    def tell(self, name: str, word: Mapping[str, Any]) -> None:
        """Send a word to one instance. Never waits."""
        if self._post is not None:
            self._post.tell(name, orjson.dumps({**word, "from": self.name}))

    def hears_again(self) -> None:
        """Believe that who was alive before still is: beats could not be heard for a while."""
        self._beats = dict.fromkeys(self._beats, monotonic())
        self.on_reunion()

    def heard_beat(self, name: str) -> None:
        """Note that an instance is alive."""
        if name != self.name and (name in self._beats or len(self._beats) < MAX_INSTANCES):
            is_new = name not in self._beats
            self._beats[name] = monotonic()
            if is_new:
                log.info("instance in name=%s", name)
                self.tell(name, {"type": "hello"})
            gone = monotonic() - ALIVE_SECONDS
            for other in [other for other, at in self._beats.items() if at < gone]:
                self._lose(other)

    def heard_word(self, data: bytes) -> None:
        """Read a word that came on this instance's channel. Never raises: anybody may write there."""
        try:
            word = orjson.loads(data)
            sender, kind = str(word["from"]), word["type"]
            if kind == "receipts":
                self.on_receipts(sender, word["receipts"])
            elif kind == "answer":
                self._note_answer(sender, str(word["id"]), word["answer"])
            elif kind == "question":
                self._spawn(sender, str(word["id"]), str(word["question"]), word["about"])
            elif kind == "hello":
                self.heard_beat(sender)
            elif kind == "bye":
                self._lose(sender)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._metrics.mirror_rejected["word"] += 1

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer questions; on leaving, say good-bye."""
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            for name in self.others:
                self.tell(name, {"type": "bye"})

    def _lose(self, name: str) -> None:
        if self._beats.pop(name, None) is not None:
            log.info("instance out name=%s", name)
        for question in self._questions.values():
            question.missing.discard(name)
            self._settle(question)

    def _note_answer(self, sender: str, question_id: str, answer: Answer) -> None:
        question = self._questions.get(question_id)
        if question is not None and sender in question.missing and isinstance(answer, dict):
            question.missing.discard(sender)
            question.answers[sender] = answer
            self._settle(question)

    def _settle(self, question: _Question) -> None:
        if not question.missing and not question.answered.done():
            question.answered.set_result(None)

    def _spawn(
        self, sender: str, question_id: str, question: str, about: Mapping[str, Any]
    ) -> None:
        known = question in self._answerers and isinstance(about, dict)
        if not known or len(self._tasks) >= MAX_QUESTIONS:
            self._metrics.mirror_rejected["question"] += 1
            return
        task = asyncio.create_task(self._reply(sender, question_id, question, about))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reply(
        self, sender: str, question_id: str, question: str, about: Mapping[str, Any]
    ) -> None:
        try:
            answer = await self._answerers[question](about)
        except (KeyError, TypeError, ValueError):  # anybody may ask anything
            self._metrics.mirror_rejected["question"] += 1
        except Exception:  # its asker is told that nothing came
            log.exception("a question of another instance failed: %s", question)
        else:
            self.tell(sender, {"type": "answer", "id": question_id, "answer": answer})
