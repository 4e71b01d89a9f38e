"""The order in which a message is checked and who answers it, without a socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import orjson
import pytest

from wsgateway import config, handlers, providers
from wsgateway.errors import ConfigError, InvalidMessage, ServiceError
from wsgateway.handlers import Device, handler
from wsgateway.limits import Window
from wsgateway.metrics import Metrics
from wsgateway.session import Action, Rules, Session, Stop, Wait
from wsgateway.wire import CloseCode


class ADevice:
    """A device that handlers see."""

    user_id, device_id = 7, 8
    services = providers.build(config.Config(), Metrics())
    history, versioned = None, False


def session(limit: int = 100, **own: Callable[..., Any]) -> Session:
    """A session with the built-in handlers and some of the test's own."""
    known = dict(handlers.load(()))
    for name, function in own.items():
        known[name] = handlers._describe(handler(name)(function), __name__)
    rules = Rules(known, message_characters=200, handler_timeout=5, metrics=Metrics())
    return Session(rules, Window(limit, 60), cast(Device, ADevice()))


def answer(action: Action) -> dict[str, Any]:
    assert isinstance(action, bytes)
    document: dict[str, Any] = orjson.loads(action)
    assert document.pop("timestamp")
    return document


def test_the_rate_is_checked_before_anything_else() -> None:
    one = session(limit=1)
    assert answer(one.receive_text(b"x" * 500, 0))["code"] == "MESSAGE_TOO_LARGE"
    for action in (one.receive_text(b"x" * 500, 1), one.receive_binary(1)):
        assert isinstance(action, Stop)
        assert action.code is CloseCode.RATE_LIMITED
        assert orjson.loads(action.payload)["message"] == "Rate limit exceeded"


def test_size_is_checked_before_json_and_counts_characters() -> None:
    text = '{"type":"' + "鱼" * 188 + '"}'
    assert len(text) == 199
    assert answer(session().receive_text(text.encode(), 0))["code"] == "UNSUPPORTED_TYPE"
    assert answer(session().receive_text(b"[" * 201, 0))["code"] == "MESSAGE_TOO_LARGE"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"type": "ping", "message": {"any": 1}}, {"type": "pong"}),
        (
            {"type": "sing"},
            {
                "type": "sing_response",
                "data": {"song": "", "artist": "", "action": "start_singing"},
                "message": "开始播放: - ",
            },
        ),
        (
            {"type": "dance", "message": {"dance": "街舞", "style": "hiphop"}},
            {
                "type": "dance_response",
                "data": {
                    "dance": "街舞",
                    "style": "hiphop",
                    "duration": "30秒",
                    "action": "start_dancing",
                },
                "message": "开始跳舞:街舞 (hiphop)",
            },
        ),
    ],
)
def test_what_needs_no_waiting_is_answered_at_once(
    message: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert answer(session().receive_text(orjson.dumps(message), 0)) == expected


async def test_what_needs_waiting_is_answered_by_a_task() -> None:
    one = session()
    wait = one.receive_text(orjson.dumps({"type": "chat_message", "message": "你好"}), 0)
    assert isinstance(wait, Wait)
    assert answer(await one.run(wait)) == {"type": "chat_response", "message": "收到消息:你好"}


def raising(error: Exception) -> Callable[..., Any]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ServiceError("no lamp"), "SERVICE_ERROR", "no lamp"),
        (
            InvalidMessage({"on": ["why"]}),
            "VALIDATION_ERROR",
            'Message validation error: {"on":["why"]}',
        ),
        (ValueError("secret"), "INTERNAL_ERROR", "Internal server error"),
        (KeyError("secret"), "INTERNAL_ERROR", "Internal server error"),
    ],
)
async def test_a_handler_that_fails_says_only_what_the_device_may_know(
    error: Exception, code: str, text: str
) -> None:
    plain = session(x=raising(error)).receive_text(b'{"type":"x"}', 0)
    assert answer(plain) == {"type": "error", "message": text, "code": code}

    async def fail() -> None:
        raise error

    one = session(x=fail)
    wait = one.receive_text(b'{"type":"x"}', 0)
    assert isinstance(wait, Wait)
    assert answer(await one.run(wait))["message"] == text


async def test_a_handler_that_takes_too_long_is_given_up() -> None:
    import asyncio

    async def never() -> None:
        await asyncio.Event().wait()

    one = session(x=never)
    object.__setattr__(one._rules, "handler_timeout", 0.01)
    wait = one.receive_text(b'{"type":"x"}', 0)
    assert isinstance(wait, Wait)
    assert answer(await one.run(wait))["code"] == "SERVICE_ERROR"


def test_an_answer_json_cannot_say_is_an_internal_error() -> None:
    action = session(x=lambda: {"data": {1, 2}}).receive_text(b'{"type":"x"}', 0)
    assert answer(action)["code"] == "INTERNAL_ERROR"


def test_a_handler_may_answer_nothing_and_its_answer_has_a_type() -> None:
    assert session(x=lambda: None).receive_text(b'{"type":"x"}', 0) is None
    empty = session(x=lambda: {**{}})  # noqa: PIE800
    assert answer(empty.receive_text(b'{"type":"x"}', 0)) == {"type": "x_response"}


def test_messages_are_counted_by_registered_type_only() -> None:
    one = session()
    for kind in ("ping", "ping", "made_up_1", "made_up_2"):
        one.receive_text(orjson.dumps({"type": kind}), 0)
    assert one._rules.metrics.received == {"ping": 2, "unknown": 2}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("no.such.module", "cannot be imported"),
        ("json", "has no function marked"),
        ("tests.broken_handlers", "takes 3 parameters"),
    ],
)
def test_a_module_that_cannot_be_used_is_named(module: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        handlers.load([module])
    assert module in str(caught.value)
    assert "\n" not in str(caught.value)
