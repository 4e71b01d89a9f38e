"""Calls about the gateway itself."""

from __future__ import annotations

from typing import Any

from wsgateway import __version__
from wsgateway.api import answers
from wsgateway.api.context import Api
from wsgateway.api.routes import Call, NoQuery, route


@route("GET", "/api/stats", answer=answers.Stats)
async def stats(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:  # noqa: ARG001
    """Connections, users, devices, rates, timings, the state of Redis, and the instances."""
    counts = await api.control.counts()
    return {
        "instance": api.cluster.name,
        "version": __version__,
        "connections": counts[api.cluster.name]["connections"],
        "users": counts[api.cluster.name]["users"],
        "devices": counts[api.cluster.name]["devices"],
        "rates": api.rates.per_second(),
        "operations": api.timings.summary(),
        "redis": dict(api.metrics.redis_states),
        "instances": counts,
    }
