"""The outside services that handlers ask, as ports.

Only this package knows outside services. It knows neither devices nor sockets: a provider takes
words and returns values, or raises `ServiceError` with a reason that a person understands.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from wsgateway.config import Config
from wsgateway.metrics import Metrics
from wsgateway.providers.echo import EchoChat
from wsgateway.providers.history import History
from wsgateway.providers.sample import SampleWeather

__all__ = ["Chat", "History", "Services", "Weather", "build"]


class Weather(Protocol):
    """Current weather by city."""

    async def current(self, city: str) -> dict[str, Any]:
        """The weather of a city now.

        Returns:
            ``{"city": {"name"}, "weather": {"now": {"temp", "text", "icon", ...}, "updateTime"}}``,
            all values texts.

        Raises:
            ServiceError: why there is none, in words for the device. Cancelling is safe.

        """
        ...

    async def check(self) -> None:
        """Ask the service once, for real. Raises ServiceError with why it does not work."""
        ...


class Chat(Protocol):
    """A partner in conversation."""

    async def reply(
        self,
        text: str,
        *,
        user_id: int,
        history: History,
        delta: Callable[[str], object] | None = None,
    ) -> str:
        """The answer to what a user says, after what both said before.

        ``history`` is the conversation's own, to be read and added to. ``delta``, where given, may
        be called with the parts of the answer as they come; all of them make up the answer.

        Raises:
            ServiceError: why there is none, in words for the device. Cancelling is safe.

        """
        ...

    async def check(self) -> None:
        """Ask the service once, for real. Raises ServiceError with why it does not work."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The providers that this instance is configured with."""

    weather: Weather
    chat: Chat
    parts: tuple[Callable[[], AbstractAsyncContextManager[None]], ...] = ()
    """What must run for them, in this order."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Let the providers be asked; on leaving no request is under way and nothing is open."""
        async with contextlib.AsyncExitStack() as stack:
            for part in self.parts:
                await stack.enter_async_context(part())
            yield


def build(config: Config, metrics: Metrics) -> Services:
    """The providers that the configuration names. Raises ConfigError for what they cannot use."""
    weather: Weather = SampleWeather()
    chat: Chat = EchoChat()
    if config.weather.provider == "sample" and config.chat.provider == "echo":
        return Services(weather, chat)
    from wsgateway.providers.outbound import Outbound  # an HTTP client only where it is needed

    outbound = Outbound()
    parts: list[Callable[[], AbstractAsyncContextManager[None]]] = [outbound.running]
    if config.weather.provider == "qweather":
        from wsgateway.providers.qweather import QWeather

        weather = qweather = QWeather(config.weather, outbound, metrics)
        parts.append(qweather.running)
    if config.chat.provider == "openai":
        from wsgateway.providers.openai import OpenAIChat

        chat = OpenAIChat(config.chat, outbound, metrics)
    return Services(weather, chat, tuple(parts))
