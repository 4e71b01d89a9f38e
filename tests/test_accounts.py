"""Users, devices and tokens as a running gateway changes them: from the API to the database, at once.

The first part asks the room itself, on a real database; the second goes through HTTP, with devices
that are connected while their tokens come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import time
from collections.abc import AsyncIterator
from datetime import datetime

import pytest
from websockets.exceptions import InvalidStatus

from tests.conftest import Accounts as Database
from tests.conftest import eventually
from tests.test_api import API, Backend, calling, close_of, got_nothing
from wsgateway import auth, config
from wsgateway.accounts import Accounts, iso_time
from wsgateway.errors import NotFound
from wsgateway.metrics import Metrics


@contextlib.asynccontextmanager
async def room(database: Database) -> AsyncIterator[Accounts]:
    """The room on a database, without a gateway around it."""
    settings = config.Auth(poll_interval=0.05)
    authenticator = auth.Authenticator(settings, database.path, Metrics())
    async with authenticator.running(lambda: None):
        yield Accounts(database.path, authenticator)


async def test_who_exists_is_known_and_a_change_by_another_program_is_noticed(
    accounts: Database,
) -> None:
    async with room(accounts) as made:
        for _ in range(2):
            assert await made.exists("user", 1)
            assert await made.exists("device", 1)
            assert not await made.exists("user", 2)
            assert not await made.exists("device", 2)
        await accounts.add_user("bob")
        async with asyncio.timeout(10):
            while not await made.exists("user", 2):
                await asyncio.sleep(0)  # it is remembered: asking gives nobody else a turn
        accounts.execute("DELETE FROM users WHERE id = 2")
        async with asyncio.timeout(10):
            while await made.exists("user", 2):
                await asyncio.sleep(0)  # it is remembered: asking gives nobody else a turn


async def test_nobody_is_said_not_to_exist_by_a_database_that_is_away(accounts: Database) -> None:
    async with room(accounts) as made:
        accounts.path.rename(accounts.path.with_suffix(".away"))
        async with asyncio.timeout(10):
            while not await made.exists("user", 99):
                await asyncio.sleep(0)  # it is remembered: asking gives nobody else a turn


async def test_a_token_is_stored_by_its_hash_alone(accounts: Database) -> None:
    async with room(accounts) as made:
        token_id, token = await made.create_token(1, "device", None, "kitchen", None)
        token_hash = hashlib.sha256(token.encode()).hexdigest()
        assert await made.token_hash(token_id) == token_hash
    for file in accounts.path.parent.glob("wsgateway.db*"):
        assert token.encode() not in file.read_bytes()


async def test_what_is_not_there_is_not_found(accounts: Database) -> None:
    async with room(accounts) as made:
        with pytest.raises(NotFound):
            await made.create_token(99, "device", None, "", None)
        with pytest.raises(NotFound):
            await made.create_token(1, "device", 99, "", None)
        with pytest.raises(NotFound):
            await made.token_hash(99)
        await made.revoke("ab" * 32)  # another instance's, perhaps
        assert [row["id"] for row in await made.tokens(None, 0, 10)] == [1]


async def test_a_token_says_why_it_is_not_valid(accounts: Database) -> None:
    async with room(accounts) as made:
        await made.create_token(1, "api", None, "", int(time.time()) - 1)
        token_id, _ = await made.create_token(1, "admin", None, "", None)
        await made.revoke(await made.token_hash(token_id))
        states = [row["state"] for row in await made.tokens(1, 0, 10)]
        assert states == ["valid", "expired", "revoked"]
        await made.set_active(1, False)
        assert (await made.tokens(1, 0, 1))[0]["state"] == "disabled"


def test_times_are_told_with_their_offset() -> None:
    assert iso_time(0) == "1970-01-01T00:00:00+00:00"
    assert iso_time(None) is None


# Through HTTP. The gateway polls its database so rarely that only the call itself can be quick.


@pytest.fixture
async def backend(accounts: Database) -> AsyncIterator[Backend]:
    async with calling(accounts, auth__poll_interval=5) as made:
        yield made


async def test_a_token_is_usable_at_once_and_shown_only_once(backend: Backend) -> None:
    reply = await backend.post("/api/tokens", {"user_id": 1, "label": "厨房", "expires_in": 3600})
    made = reply.data
    assert made.keys() == {"id", "token", "user_id", "device_id", "scope", "expires_at"}
    assert (made["user_id"], made["device_id"], made["scope"]) == (1, None, "device")
    left = datetime.fromisoformat(made["expires_at"]).timestamp() - time.time()
    assert 3500 < left <= 3600
    async with backend.instance.device(made["token"]) as device:
        assert await got_nothing(device)
    page = (await backend.get("/api/tokens")).data
    assert page.keys() == {"tokens", "next"}
    [_, row] = page["tokens"]
    assert datetime.fromisoformat(row.pop("created_at")).timestamp() > time.time() - 60
    assert row == {
        "id": made["id"], "user_id": 1, "user_name": "alice", "device_id": 1, "scope": "device",
        "label": "厨房", "expires_at": made["expires_at"], "state": "valid",
    }  # fmt: skip
    text = str(page)
    for token in (made["token"], backend.accounts.token):
        assert token not in text
        assert auth.hash_token(token) not in text


@pytest.mark.parametrize("scope", ["api", "admin"])
async def test_a_key_made_through_the_api_opens_it_until_it_is_revoked(
    backend: Backend, scope: str
) -> None:
    made = (await backend.post("/api/tokens", {"user_id": 1, "scope": scope})).data
    key = made["token"]
    assert (await backend.get("/api/stats", key=key)).status == 200
    status = (await backend.get("/api/tokens", key=key)).status
    assert status == (200 if scope == "admin" else 403)
    cut = (await backend.delete(f"/api/tokens/{made['id']}")).data
    assert cut == {"cut": 0, "instances": {"here": 0}, "complete": True}
    assert (await backend.get("/api/stats", key=key)).told == (401, "unauthorized", None)


async def test_a_token_that_is_revoked_is_cut_at_once_and_does_not_come_in_again(
    backend: Backend,
) -> None:
    made = (await backend.post("/api/tokens", {"user_id": 1})).data
    device = backend.instance.device
    async with device(made["token"]) as one, device(made["token"]) as two, device() as other:
        reply = await backend.delete(f"/api/tokens/{made['id']}")
        assert reply.data == {"cut": 2, "instances": {"here": 2}, "complete": True}
        for each in (one, two):
            assert (await close_of(each))[0] == 4001
        assert await got_nothing(other)
        with pytest.raises(InvalidStatus) as refused:
            async with device(made["token"]):
                pass
        assert refused.value.response.status_code == 403
    await eventually(lambda: not backend.instance.running.instance.roster.counts()["connections"])
    again = await backend.delete(f"/api/tokens/{made['id']}")
    assert again.data == {"cut": 0, "instances": {"here": 0}, "complete": True}
    [_, row] = (await backend.get("/api/tokens")).data["tokens"]
    assert row["state"] == "revoked"


async def test_a_token_for_a_device_joins_its_group(backend: Backend) -> None:
    accounts = backend.accounts
    _, lamp = await accounts.add_user("bob", "lamp")
    with contextlib.closing(sqlite3.connect(accounts.path, isolation_level=None)) as database:
        database.execute("INSERT INTO bindings (user_id, device_id) VALUES (1, ?)", [lamp])
    made = (await backend.post("/api/tokens", {"user_id": 1, "device_id": lamp})).data
    assert made["device_id"] == lamp
    async with backend.instance.device(made["token"]):
        [row] = (await backend.get(f"/api/connections?device_id={lamp}")).data["connections"]
        assert (row["user_id"], row["device_id"]) == (1, lamp)


async def test_a_backend_without_power_over_others_makes_and_ends_no_token(
    backend: Backend,
) -> None:
    async with backend.instance.device() as device:
        for reply in (
            await backend.post("/api/tokens", {"user_id": 1, "scope": "admin"}, key=API),
            await backend.delete("/api/tokens/1", key=API),
            await backend.post("/api/users/1/disable", key=API),
        ):
            assert reply.told == (403, "forbidden", None)
        assert await got_nothing(device)
    assert len((await backend.get("/api/tokens")).data["tokens"]) == 1


async def test_tokens_made_at_once_are_all_different_and_all_work(backend: Backend) -> None:
    replies = await asyncio.gather(
        *(backend.post("/api/tokens", {"user_id": 1, "scope": "api"}) for _ in range(20))
    )
    tokens = {reply.data["token"] for reply in replies}
    assert len(tokens) == len({reply.data["id"] for reply in replies}) == 20
    for token in tokens:
        assert (await backend.get("/api/stats", key=token)).status == 200
