"""Calls about the queue in Redis: size, enqueue, clear."""

from __future__ import annotations

from typing import Any

import msgspec

from wsgateway.api import answers, problems
from wsgateway.api.context import Api, Queue
from wsgateway.api.messages import Number, check_exists, encode
from wsgateway.api.routes import Call, NoQuery, route


class Item(msgspec.Struct, frozen=True):
    """A message for the queue."""

    user_id: Number
    message: dict[str, Any]


@route("GET", "/api/queue", answer=answers.QueueSize, errors=(503,))
async def queue_size(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:  # noqa: ARG001
    """How many messages wait in the queue, and how many were rejected."""
    return await _queue(api).size()


@route("POST", "/api/queue", answer=answers.Enqueued, body=Item, errors=(404, 503))
async def enqueue(api: Api, call: Call[NoQuery, Item]) -> dict[str, Any]:
    """Put a message into the queue; it is sent in order, also if its instance is killed."""
    queue, user_id = _queue(api), int(call.body.user_id)
    encode(api, call.body.message)
    await check_exists(api, "user", user_id)
    return {"waiting": await queue.enqueue(user_id, call.body.message)}


@route("DELETE", "/api/queue", answer=answers.Cleared, scope="admin", errors=(503,))
async def clear_queue(api: Api, call: Call[NoQuery, None]) -> dict[str, Any]:  # noqa: ARG001
    """Throw away the messages that wait."""
    return {"cleared": await _queue(api).clear()}


def _queue(api: Api) -> Queue:
    if api.queue is None:
        raise problems.unavailable("there is no queue without redis.url and queue.enabled")
    return api.queue
