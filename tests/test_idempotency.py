"""Sends that are repeated: one key sends once, and always has the same answer.

The first part asks the room itself; the second goes through HTTP, with a device that would see
whatever is sent twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Accounts
from tests.test_api import (
    ADMIN,
    API,
    CHAT,
    Backend,
    calling,
    got_nothing,
    read_reply,
    received,
    request,
    sent,
    socket_to,
)
from wsgateway.api.idempotency import Idempotency
from wsgateway.errors import Conflict


class Sender:
    """Counts how often it sends, and fails or waits as told."""

    def __init__(self) -> None:
        self.sent = 0
        self.failure: Exception | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def send(self) -> int:
        self.sent += 1
        await self.may_end.wait()
        if self.failure is not None:
            raise self.failure
        return self.sent


async def test_the_same_key_sends_once_and_another_key_again() -> None:
    keys, sender = Idempotency(10), Sender()
    assert [await keys.once(key, "", sender.send) for key in "aaba"] == [1, 1, 2, 1]


async def test_the_same_key_with_another_body_is_a_conflict_also_while_the_first_is_under_way() -> (
    None
):
    keys, sender = Idempotency(10), Sender()
    sender.may_end.clear()
    first = asyncio.create_task(keys.once("a", "1", sender.send))
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(Conflict):
            await keys.once("a", "2", sender.send)
        sender.may_end.set()
        assert await first == 1
    assert sender.sent == 1


async def test_repetitions_wait_for_the_first_and_share_its_failure() -> None:
    keys, sender = Idempotency(10), Sender()
    sender.may_end.clear()
    sender.failure = LookupError()
    waiting = [asyncio.create_task(keys.once("a", "", sender.send)) for _ in range(5)]
    await asyncio.sleep(0)
    sender.may_end.set()
    assert set(map(type, await asyncio.gather(*waiting, return_exceptions=True))) == {LookupError}
    sender.failure = None
    assert await keys.once("a", "", sender.send) == 2


async def test_who_gives_up_waiting_stops_nothing() -> None:
    keys, sender = Idempotency(10), Sender()
    sender.may_end.clear()
    first = asyncio.create_task(keys.once("a", "", sender.send))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    again = asyncio.create_task(keys.once("a", "", sender.send))
    await asyncio.sleep(0)
    sender.may_end.set()
    assert await again == 1


async def test_a_send_that_fails_after_its_caller_gave_up_may_be_repeated() -> None:
    keys, sender = Idempotency(10), Sender()
    sender.may_end.clear()
    sender.failure = LookupError()
    first = asyncio.create_task(keys.once("a", "", sender.send))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    sender.may_end.set()
    for _ in range(5):  # the send itself ends
        await asyncio.sleep(0)
    sender.failure = None
    assert await keys.once("a", "", sender.send) == 2


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 5))
def test_the_oldest_keys_are_forgotten_first(asked: list[int], size: int) -> None:
    async def ask_all() -> None:
        keys, sender = Idempotency(size), Sender()
        remembered: dict[str, int] = {}
        for key in map(str, asked):
            # A key that is asked for when all places are taken may be the one that goes.
            if len(remembered) >= size:
                remembered.pop(next(iter(remembered)))
            answer = await keys.once(key, "", sender.send)
            assert answer == remembered.setdefault(key, sender.sent)
            assert len(keys._entries) <= size

    asyncio.run(ask_all())


# Through HTTP.


@pytest.fixture
async def backend(accounts: Accounts) -> AsyncIterator[Backend]:
    async with calling(accounts) as made:
        yield made


def with_key(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


PATHS = {
    "/api/messages": CHAT,
    "/api/users/1/messages": {"message": 1},
    "/api/devices/1/messages": {"message": 1},
    "/api/broadcast": {"message": 1},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", ["header", "body"])
async def test_a_repetition_is_answered_as_the_first_and_sends_nothing(
    backend: Backend, path: str, place: str
) -> None:
    body: dict[str, Any] = dict(PATHS[path])
    headers = with_key("k") if place == "header" else {}
    if place == "body":
        body["id"] = "k"
    async with backend.instance.device() as device:
        first = await backend.post(path, body, headers=headers)
        assert await received(device) == first.data
        for _ in range(3):
            again = await backend.post(path, body, headers=headers)
            assert (again.status, again.body) == (200, first.body)
        assert await got_nothing(device)


async def test_the_key_in_the_header_and_the_id_in_the_body_are_the_same_word(
    backend: Backend,
) -> None:
    async with backend.instance.device() as device:
        first = await backend.post("/api/messages", CHAT, headers=with_key("k"))
        again = await backend.post("/api/messages", {**CHAT, "id": "k"})
        assert again.body == first.body
        await received(device)
        assert await got_nothing(device)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("/api/messages", {**CHAT, "message": {"text": "x"}}),
    "type": ("/api/messages", {**CHAT, "type": "x"}),
    "user": ("/api/messages", {**CHAT, "user_id": 2}),
    "path": ("/api/broadcast", {"type": CHAT["type"], "message": CHAT["message"]}),
}


@pytest.mark.parametrize(("path", "body"), OTHERS.values(), ids=OTHERS)
async def test_the_same_key_with_another_body_is_a_conflict_and_sends_nothing(
    backend: Backend, path: str, body: dict[str, Any]
) -> None:
    await backend.accounts.add_user("bob", "lamp")
    bobs = await backend.accounts.add_token(2)
    async with backend.instance.device() as device, backend.instance.device(bobs) as other:
        first = await backend.post("/api/messages", CHAT, headers=with_key("k"))
        await received(device)
        reply = await backend.post(path, body, headers=with_key("k"))
        assert reply.told == (409, "conflict", None)
        assert await got_nothing(device)
        assert await got_nothing(other)
        assert (await backend.post("/api/messages", CHAT, headers=with_key("k"))).body == first.body


async def test_callers_do_not_share_their_keys(backend: Backend) -> None:
    await backend.accounts.add_user("bob")
    bob = await backend.accounts.add_token(2, scope="api")
    alice = await backend.accounts.add_token(1, scope="api")
    async with backend.instance.device() as device:
        replies = [
            await backend.post("/api/messages", CHAT, key=key, headers=with_key("k"))
            for key in (ADMIN, API, bob, alice)
        ]
        assert len({reply.body["delivery"]["id"] for reply in replies}) == 4
        for reply in replies:
            assert await received(device) == reply.data
        assert await got_nothing(device)


async def test_a_key_of_the_configuration_named_as_a_user_is_another_caller(
    backend: Backend,
) -> None:
    namesake, _ = await backend.accounts.add_user("backend")
    key = await backend.accounts.add_token(namesake, scope="api")
    async with backend.instance.device() as device:
        replies = [
            await backend.post("/api/messages", CHAT, key=one, headers=with_key("k"))
            for one in (API, key)
        ]
        assert len({reply.body["delivery"]["id"] for reply in replies}) == 2
        for reply in replies:
            assert await received(device) == reply.data


async def test_of_many_repetitions_at_once_one_sends_and_all_have_its_answer(
    backend: Backend,
) -> None:
    async with backend.instance.device() as device:
        replies = await asyncio.gather(
            *(backend.post("/api/messages", CHAT, headers=with_key("k")) for _ in range(50))
        )
        assert all(reply.body == replies[0].body for reply in replies)
        assert await received(device) == replies[0].data
        assert await got_nothing(device)


async def test_a_send_that_failed_may_be_repeated_with_its_key(backend: Backend) -> None:
    path = "/api/messages?require=online"
    for _ in range(2):
        reply = await backend.post(path, CHAT, headers=with_key("k"))
        assert reply.told == (404, "offline", None)
    async with backend.instance.device() as device:
        reply = await backend.post(path, CHAT, headers=with_key("k"))
        assert reply.status == 200
        assert await received(device) == reply.data
        assert (await backend.post(path, CHAT, headers=with_key("k"))).body == reply.body
        assert await got_nothing(device)


async def test_a_send_to_nobody_that_succeeded_is_not_sent_later(backend: Backend) -> None:
    first = await backend.post("/api/messages", CHAT, headers=with_key("k"))
    assert first.body["delivery"]["matched"] == 0
    async with backend.instance.device() as device:
        again = await backend.post("/api/messages", CHAT, headers=with_key("k"))
        assert again.body == first.body
        assert await got_nothing(device)


async def test_a_caller_who_hung_up_repeats_safely(backend: Backend) -> None:
    async with backend.instance.device() as device:
        async with socket_to(backend.instance) as (_, writer):
            writer.write(request(sent(), "Idempotency-Key: k"))
            await writer.drain()
        first = await received(device)
        async with socket_to(backend.instance) as (reader, writer):
            writer.write(request(sent(), "Idempotency-Key: k"))
            assert (await read_reply(reader)).data == first
        assert await got_nothing(device)


async def test_the_ids_of_a_batch_are_as_those_of_single_sends(backend: Backend) -> None:
    batch = [
        {**CHAT, "id": "a"},
        {**CHAT, "id": "b"},
        {**CHAT, "id": "a"},
        {**CHAT, "id": "a", "message": 5},
    ]
    async with backend.instance.device() as device:
        single = await backend.post("/api/messages", {**CHAT, "id": "b"})
        results = (await backend.post("/api/messages/batch", batch)).data["results"]
        assert results[1] == single.body
        assert results[0] == results[2]
        assert (results[3]["http_status"], results[3]["code"]) == (409, "conflict")
        assert [await received(device), await received(device)] == [single.data, results[0]["data"]]
        assert await got_nothing(device)


async def test_a_batch_may_be_repeated_with_one_key_for_all_of_it(backend: Backend) -> None:
    batch = [{**CHAT, "message": number} for number in (1, 2, 2)]
    async with backend.instance.device() as device:
        first = await backend.post("/api/messages/batch", batch, headers=with_key("k"))
        assert [one["status"] for one in first.data["results"]] == ["success"] * 3
        assert [(await received(device))["message"] for _ in batch] == [1, 2, 2]
        again = await backend.post("/api/messages/batch", batch, headers=with_key("k"))
        assert again.body == first.body
        assert await got_nothing(device)


@pytest.mark.parametrize(("key", "status"), [("x" * 128, 200), ("x" * 129, 422), ("", 422)])
async def test_a_key_is_of_1_to_128_characters(backend: Backend, key: str, status: int) -> None:
    reply = await backend.post("/api/messages", CHAT, headers=with_key(key))
    assert reply.status == status
    if status == 422:
        assert reply.told == (422, "invalid", "Idempotency-Key")


async def test_a_key_may_hold_any_characters(backend: Backend) -> None:
    for key in ("ключ", "a b;c=d", '"quoted"'):
        assert (await backend.post("/api/messages", CHAT, headers=with_key(key))).status == 200


async def test_only_so_many_keys_are_remembered_and_the_oldest_goes_first(
    accounts: Accounts,
) -> None:
    async with calling(accounts, api__idempotency_keys=2) as backend:
        answers = {}
        for key in "abc":
            answers[key] = await backend.post("/api/messages", CHAT, headers=with_key(key))
        again = await backend.post("/api/messages", CHAT, headers=with_key("c"))
        assert again.body == answers["c"].body
