"""Calls about the gateway itself."""

from __future__ import annotations

from typing import Any

from wsgateway import __version__
from wsgateway.api import answers, problems
from wsgateway.api.context import Api
from wsgateway.api.routes import Call, NoQuery, route
from wsgateway.errors import ConfigError


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
        "operations": api.metrics.operations(),
        "redis": dict(api.metrics.redis_states),
        "instances": counts,
    }


@route("POST", "/api/reload", answer=answers.Reloaded, scope="admin", errors=(409, 422))
async def reload(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:  # noqa: ARG001
    """Read the configuration again and put it in use, on this instance; 422 says why not."""
    try:
        changes = await api.reload()
    except ConfigError as error:
        raise problems.unusable(str(error)) from None
    return changes._asdict()
