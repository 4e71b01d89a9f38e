"""The types that ask an outside service: chat_message, weather."""

from __future__ import annotations

from typing import Any

import msgspec

from wsgateway import wire
from wsgateway.handlers import Device, handler
from wsgateway.providers import History


class City(msgspec.Struct):
    city: str = "北京"


class Deltas:
    """Sends the parts of an answer to a device as they come: ``chat_delta``, numbered from 0."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._next = 0

    def __call__(self, text: str) -> None:
        self._device.send(
            {
                "type": "chat_delta",
                "seq": self._next,
                "delta": text,
                "timestamp": wire.timestamp(),
            }
        )
        self._next += 1


@handler("chat_message")
async def chat_message(message: str, device: Device) -> dict[str, Any]:
    if device.history is None:
        device.history = History()
    answer = await device.services.chat.reply(
        message,
        user_id=device.user_id,
        history=device.history,
        # Plain clients expect one answer to one message.
        delta=Deltas(device) if device.versioned else None,
    )
    return {"type": "chat_response", "message": answer}


@handler("weather", failure="Weather query failed: {}")
async def weather(message: City, device: Device) -> dict[str, Any]:
    data = await device.services.weather.current(message.city)
    return {"type": "weather_response", "data": data}
