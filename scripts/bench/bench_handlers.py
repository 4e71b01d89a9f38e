"""The message type that the benchmark publishes with."""

from __future__ import annotations

from typing import Any

from wsgateway.handlers import Device, handler
from wsgateway.wire import timestamp


@handler("publish")
def publish(message: str, device: Device) -> None:
    news: dict[str, Any] = {"type": "news", "message": message, "timestamp": timestamp()}
    device.gateway.to_all(news)
