"""The weather provider that works without a key: one sunny day, marked as a sample."""

from __future__ import annotations

from typing import Any


class SampleWeather:
    """Answers in the shape of a real provider and says ``sample`` so that nobody mistakes it."""

    async def current(self, city: str) -> dict[str, Any]:
        return {
            "city": {"name": city},
            "weather": {
                "now": {"temp": "25", "text": "晴", "icon": "100"},
                "updateTime": "2023-01-01T12:00:00Z",
            },
            "sample": True,
        }

    async def check(self) -> None:
        """Nothing can be wrong with it."""
