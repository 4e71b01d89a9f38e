"""The types that ask an outside service: chat_message, weather."""

from __future__ import annotations

from typing import Any

import msgspec

from wsgateway.handlers import Device, handler


class City(msgspec.Struct):
    city: str = "北京"


@handler("chat_message")
async def chat_message(message: str, device: Device) -> dict[str, Any]:
    answer = await device.services.chat.reply(message, user_id=device.user_id)
    return {"type": "chat_response", "message": answer}


@handler("weather", failure="Weather query failed: {}")
async def weather(message: City, device: Device) -> dict[str, Any]:
    data = await device.services.weather.current(message.city)
    return {"type": "weather_response", "data": data}
