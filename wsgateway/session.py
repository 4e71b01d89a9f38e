"""What one device may do next: a message in, what to do about it out.

Only this module decides in which order a message is checked and who answers it. It knows no
sockets and no clock (the time is passed in) and runs without an event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from wsgateway import wire
from wsgateway.errors import InvalidMessage, ServiceError
from wsgateway.handlers import Device, Handler
from wsgateway.limits import Window
from wsgateway.metrics import Metrics
from wsgateway.wire import CloseCode, ErrorCode

log = logging.getLogger(__name__)


class Wait(NamedTuple):
    """A message whose answer needs waiting: call ``run`` in a task."""

    handler: Handler
    message: Any


class Stop(NamedTuple):
    """The device has to go: send ``payload``, then close."""

    payload: bytes
    code: CloseCode


Action = bytes | Wait | Stop | None
"""What to do about a message: send an answer, run a task, end the connection, or nothing."""


@dataclass(slots=True)
class Rules:
    """What every session of an instance shares; a reload changes it for all of them."""

    handlers: Mapping[str, Handler]
    message_characters: int
    handler_timeout: float
    metrics: Metrics


class Session:
    """One device's messages, from its first to its last."""

    __slots__ = ("_device", "_rules", "window")

    def __init__(self, rules: Rules, window: Window, device: Device) -> None:
        self._rules = rules
        self._device = device
        self.window = window

    def receive_text(self, payload: bytes, now: float) -> Action:
        """Decide about a text message at ``now`` (monotonic seconds). Raises wire.NotUtf8."""
        rules = self._rules
        if not self.window.admit(now):
            return self._over_rate()
        if len(payload) > rules.message_characters and wire.longer_than(
            payload, rules.message_characters
        ):
            return self._refuse(ErrorCode.MESSAGE_TOO_LARGE, "Message too large")
        try:
            kind, raw = wire.parse(payload)
            found = rules.handlers.get(kind)
            if found is None:
                rules.metrics.received["unknown"] += 1
                raise wire.unsupported(kind)
            rules.metrics.received[kind] += 1
            message = found.decode(raw) if found.takes_message else None
        except wire.WireError as error:
            return self._refuse(error.code, error.text)
        except InvalidMessage as error:
            return self._refuse(ErrorCode.VALIDATION_ERROR, wire.invalid(error.errors).text)
        if found.waits:
            return Wait(found, message)
        try:
            return self._encoded(found, self._call(found, message))
        except Exception as error:  # noqa: BLE001 - a user's handler may raise anything
            return self.failed(found, error)

    def receive_binary(self, now: float) -> Action:
        """Decide about a binary message: none is supported."""
        if not self.window.admit(now):
            return self._over_rate()
        return self._refuse(ErrorCode.UNSUPPORTED_DATA, "Binary messages are not supported")

    async def run(self, wait: Wait) -> bytes | None:
        """Answer a message that needs waiting. Cancelling is safe: the device then gets nothing."""
        try:
            async with asyncio.timeout(self._rules.handler_timeout):
                return self._encoded(wait.handler, await self._call(*wait))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not we were cancelled, but something the handler waited for: that is its failure.
            return self.failed(wait.handler, error)
        except TimeoutError:
            return self.failed(wait.handler, ServiceError("no answer in time"))
        except Exception as error:  # noqa: BLE001 - a user's handler may raise anything
            return self.failed(wait.handler, error)

    def failed(self, handler: Handler, error: BaseException) -> bytes:
        """What the device hears when its handler raised: never the text of an unknown exception."""
        if isinstance(error, ServiceError):
            text = str(error).encode(errors="replace").decode()  # JSON has no lone surrogates
            return self._refuse(ErrorCode.SERVICE_ERROR, handler.failure.replace("{}", text))
        if isinstance(error, InvalidMessage):
            return self._refuse(ErrorCode.VALIDATION_ERROR, wire.invalid(error.errors).text)
        log.error("handler failed type=%s", handler.type, exc_info=error)
        return self._refuse(ErrorCode.INTERNAL_ERROR, "Internal server error")

    def _call(self, handler: Handler, message: Any) -> Any:
        if handler.takes_device:
            return handler.call(message, self._device)
        return handler.call(message) if handler.takes_message else handler.call()

    def _over_rate(self) -> Stop:
        payload = self._refuse(ErrorCode.RATE_LIMITED, "Rate limit exceeded")
        return Stop(payload, CloseCode.RATE_LIMITED)

    def _refuse(self, code: ErrorCode, text: str) -> bytes:
        self._rules.metrics.errors[code] += 1
        self._rules.metrics.sent["error"] += 1
        return wire.error(code, text)

    def _encoded(self, handler: Handler, answer: Mapping[str, Any] | None) -> bytes | None:
        if answer is None:
            return None
        if "type" not in answer:
            answer = {"type": f"{handler.type}_response", **answer}
        if "timestamp" not in answer:
            answer = {**answer, "timestamp": wire.timestamp()}
        encoded = wire.encode(answer)
        self._rules.metrics.sent[handler.type] += 1
        return encoded
