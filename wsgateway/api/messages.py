"""Calls that send: to a user, a device, everybody, or many of these at once.

Only this module says what a send's body holds and how a receipt becomes a status.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import UNSET, Meta, UnsetType

from wsgateway import envelope, wire
from wsgateway.api import answers, problems
from wsgateway.api.context import Api
from wsgateway.api.problems import Problem
from wsgateway.api.routes import Answer, Call, route
from wsgateway.envelope import Fate
from wsgateway.errors import Conflict
from wsgateway.gateway import ALL, device_group, user_group
from wsgateway.sends import Receipt

FINGERPRINT = 16
"""Hex digits that tell the bodies of one key apart."""

MAX_BATCH = 1000
"""Sends in one batch."""

SENT = "消息发送成功"

Type = Annotated[str, Meta(min_length=1, max_length=64, description="The message's type.")]
Key = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=128,
        description="Makes a repetition safe, as the header Idempotency-Key does.",
    ),
]
Number = Annotated[int, Meta(ge=0, le=2**63 - 1)] | Annotated[str, Meta(pattern=r"^[0-9]{1,18}$")]
"""An id, as a number or in digits."""


class SendQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a send waits."""

    timeout: (
        Annotated[float, Meta(ge=0, le=30, description="Seconds to wait for other instances.")]
        | None
    ) = None
    wait: Annotated[
        Literal["all", "none"],
        Meta(description="'none': answer without a receipt of others, as timeout=0 does."),
    ] = "all"
    require: Annotated[
        Literal["online"] | None,
        Meta(description="'online': 404 if nobody is connected; has to wait."),
    ] = None


class Message(msgspec.Struct, frozen=True):
    """A message to a user, as the seed's backend sends it."""

    type: Type
    message: Any
    user_id: Number
    id: Key | UnsetType = UNSET


class Notice(msgspec.Struct, frozen=True):
    """A message to whom the path names."""

    message: Any
    type: Type = "system"
    id: Key | UnsetType = UNSET


class BatchItem(msgspec.Struct, frozen=True):
    """One send of a batch: to a user, to a device, or to everybody."""

    type: Type
    message: Any
    user_id: Number | UnsetType = UNSET
    device_id: Number | UnsetType = UNSET
    broadcast: bool = False
    id: Key | UnsetType = UNSET


Batch = Annotated[list[BatchItem], Meta(min_length=1, max_length=MAX_BATCH)]

FAILURES = (404, 409, 503, 504)


@route("POST", "/api/messages", answer=answers.Sent, query=SendQuery, body=Message, errors=FAILURES)
async def send_message(api: Api, call: Call[SendQuery, Message]) -> Answer:
    """Send a message to a user."""
    body = call.body
    user_id = int(body.user_id)
    await check_exists(api, "user", user_id)
    message = {"type": body.type, "message": body.message, "timestamp": wire.timestamp()}
    return await _send(api, call, user_group(user_id), message, body.id)


@route(
    "POST",
    "/api/users/{user_id}/messages",
    answer=answers.Sent,
    query=SendQuery,
    body=Notice,
    errors=FAILURES,
)
async def send_to_user(api: Api, call: Call[SendQuery, Notice]) -> Answer:
    """Send a message to a user, with the caller's name as its sender."""
    body = call.body
    await check_exists(api, "user", call.number("user_id"))
    message = {
        "type": body.type,
        "message": body.message,
        "sender": call.caller.name,
        "timestamp": wire.timestamp(),
    }
    return await _send(api, call, user_group(call.number("user_id")), message, body.id)


@route(
    "POST",
    "/api/devices/{device_id}/messages",
    answer=answers.Sent,
    query=SendQuery,
    body=Notice,
    errors=FAILURES,
)
async def send_to_device(api: Api, call: Call[SendQuery, Notice]) -> Answer:
    """Send a message to a device."""
    body = call.body
    await check_exists(api, "device", call.number("device_id"))
    message = {"type": body.type, "message": body.message, "timestamp": wire.timestamp()}
    return await _send(api, call, device_group(call.number("device_id")), message, body.id)


@route("POST", "/api/broadcast", answer=answers.Sent, query=SendQuery, body=Notice, errors=FAILURES)
async def broadcast(api: Api, call: Call[SendQuery, Notice]) -> Answer:
    """Send a message to every connection of every instance."""
    body = call.body
    message = {"type": body.type, "message": body.message, "timestamp": wire.timestamp()}
    return await _send(api, call, ALL, message, body.id)


@route(
    "POST",
    "/api/messages/batch",
    answer=answers.Results,
    query=SendQuery,
    body=Batch,
    errors=(503,),
)
async def send_batch(api: Api, call: Call[SendQuery, list[BatchItem]]) -> Any:
    """Send up to 1,000 messages; one result each, in order."""
    # Who exists is asked first: then all are posted in one turn, in order.
    groups = [await _find_group(api, item) for item in call.body]
    results = await asyncio.gather(
        *(
            _send_item(api, call, item, group, number)
            for number, (item, group) in enumerate(zip(call.body, groups, strict=True))
        )
    )
    return {"results": results}


async def _find_group(api: Api, item: BatchItem) -> str | Problem:
    try:
        group = _group_of(item)
        if item.user_id is not UNSET:
            await check_exists(api, "user", int(item.user_id))
        elif item.device_id is not UNSET:
            await check_exists(api, "device", int(item.device_id))
    except Problem as problem:
        return problem
    return group


async def _send_item(
    api: Api,
    call: Call[SendQuery, list[BatchItem]],
    item: BatchItem,
    group: str | Problem,
    number: int,
) -> dict[str, Any]:
    try:
        if isinstance(group, Problem):
            raise group
        message = {"type": item.type, "message": item.message, "timestamp": wire.timestamp()}
        return (await _send(api, call, group, message, item.id, number)).body
    except Conflict as error:
        return _failure(problems.conflict(str(error)))
    except Problem as problem:
        return _failure(problem)


def _failure(problem: Problem) -> dict[str, Any]:
    return {"http_status": problem.status.value, **problem.document()}


def _group_of(item: BatchItem) -> str:
    targets = (item.user_id is not UNSET) + (item.device_id is not UNSET) + item.broadcast
    if targets == 0:
        raise problems.missing("user_id")
    if targets > 1:
        raise problems.invalid("user_id", "one of user_id, device_id and broadcast")
    if item.user_id is not UNSET:
        return user_group(int(item.user_id))
    return ALL if item.device_id is UNSET else device_group(int(item.device_id))


async def check_exists(api: Api, kind: Literal["user", "device"], number: int) -> None:
    """Raise Problem for a user or device that does not exist."""
    group = user_group(number) if kind == "user" else device_group(number)
    if not api.is_here(group) and not await api.accounts.exists(kind, number):
        raise problems.not_found(f"no such {kind}: {number}", f"{kind}_id")


async def _send(
    api: Api,
    call: Call[Any, Any],
    group: str,
    message: dict[str, Any],
    key: str | UnsetType,
    number: int | None = None,
) -> Answer:
    """Send, or answer as before where the caller repeats an idempotency key."""
    payload = encode(api, message)
    if key is not UNSET:
        number_in_key = None  # the header is one for the whole batch, the id is of one send
    else:
        number_in_key = number
        key = call.idempotency_key if call.idempotency_key is not None else UNSET
    if key is UNSET:
        message_id = envelope.new_id(envelope.ASKED)
        sending = _deliver(api, call.query, group, payload, message_id)
        # In a batch, a task of its own, as those with a key have: all keep their order.
        delivery = await (sending if number is None else asyncio.create_task(sending))
    else:
        scoped = _digest([call.caller.who, key, number_in_key])[:32]
        same = {name: value for name, value in message.items() if name != "timestamp"}
        fingerprint = _digest([group, same])[:FINGERPRINT]
        message_id = f"{envelope.KEYED}{scoped}.{fingerprint}"

        async def send() -> tuple[str, dict[str, Any]]:
            return message["timestamp"], await _deliver(api, call.query, group, payload, message_id)

        first_at, delivery = await api.idempotency.once(scoped, fingerprint, send)
        message = {**message, "timestamp": first_at}
    return Answer({"status": "success", "message": SENT, "data": message, "delivery": delivery})


def _digest(document: Any) -> str:
    return hashlib.sha256(orjson.dumps(document)).hexdigest()


def encode(api: Api, message: Mapping[str, Any]) -> bytes:
    """A message as devices get it. Raises Problem for one that they cannot."""
    try:
        payload = wire.encode(message)
        wire.read_object(payload)
    except (TypeError, ValueError):
        raise problems.invalid("message", "cannot be sent as JSON: nested over 32 deep") from None
    if len(payload) > api.max_message:
        raise problems.too_large(f"the message is longer than {api.max_message} bytes")
    return payload


async def _deliver(
    api: Api, query: SendQuery, group: str, payload: bytes, message_id: str
) -> dict[str, Any]:
    """The receipt. Raises Problem where nothing can be claimed."""
    seconds = api.receipt_timeout if query.timeout is None else query.timeout
    waits = query.wait == "all" and seconds > 0
    if query.require == "online" and not waits:
        raise problems.invalid("require", "who is online is not known without waiting")
    receipt = await api.sends.send(group, payload, message_id, seconds if waits else None)
    _check_fate(receipt, query)
    delivery = receipt.document()
    if group == ALL:
        delivery["users"] = receipt.users()
    return delivery


def _check_fate(receipt: Receipt, query: SendQuery) -> None:
    """Claim nothing that is not known. Raises Problem."""
    if receipt.matched:
        return
    if receipt.fate in (Fate.NOT_SENT, Fate.REFUSED):
        raise problems.unavailable()
    if receipt.fate is Fate.UNKNOWN:
        raise problems.unknown()
    if query.require == "online":
        raise problems.offline() if receipt.complete else problems.unknown()
