"""The outside services that handlers ask, as ports.

Only this package knows outside services. It knows neither devices nor sockets: a provider takes
words and returns values, or raises `ServiceError` with a reason that a person understands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from wsgateway.config import Config
from wsgateway.providers.echo import EchoChat
from wsgateway.providers.sample import SampleWeather


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


class Chat(Protocol):
    """A partner in conversation."""

    async def reply(self, text: str, *, user_id: int) -> str:
        """The answer to what a user says.

        Raises:
            ServiceError: why there is none, in words for the device. Cancelling is safe.

        """
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The providers that this instance is configured with."""

    weather: Weather
    chat: Chat


def build(config: Config) -> Services:
    """The providers that the configuration names."""
    weather = {"sample": SampleWeather}[config.weather.provider]
    chat = {"echo": EchoChat}[config.chat.provider]
    return Services(weather(), chat())
