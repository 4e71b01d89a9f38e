"""A message type of your own: a wall switch that turns the lights of its user on or off."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from wsgateway.errors import ServiceError
from wsgateway.handlers import Device, handler


class Light(msgspec.Struct):
    on: bool
    brightness: Annotated[int, msgspec.Meta(ge=0, le=100)] = 100


@handler("light")
def light(message: Light, device: Device) -> dict[str, Any]:
    """Tell all devices of the user, and answer the one that asked."""
    device.gateway.to_user(device.user_id, {"type": "light", "on": message.on})
    return {"data": {"on": message.on, "brightness": message.brightness}}


@handler("light_schedule")
async def light_schedule(message: str, device: Device) -> dict[str, Any]:
    """A handler that waits is a coroutine; what it cannot do it says with ServiceError."""
    if message != "sunset":
        raise ServiceError(f"Unknown schedule: {message[:40]}")
    forecast = await device.services.weather.current("北京")
    return {"data": {"schedule": message, "sky": forecast["weather"]["now"]["text"]}}
