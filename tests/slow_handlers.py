"""A message type that takes its time."""

from __future__ import annotations

import asyncio
from typing import Any

from wsgateway.handlers import handler


@handler("wait_a_second")
async def wait_a_second() -> dict[str, Any]:
    await asyncio.sleep(1)
    return {}
