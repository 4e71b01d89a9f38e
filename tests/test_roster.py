"""Who is connected to one instance: who is found, on which page, and who is cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic

from hypothesis import given
from hypothesis import strategies as st

from wsgateway.fanout import Member
from wsgateway.gateway import groups_of
from wsgateway.hub import Hub
from wsgateway.roster import BATCH, Roster, wall
from wsgateway.wire import CloseCode


@dataclass(eq=False)
class Guest:
    """A connected device that remembers how it was closed."""

    id: str
    user_id: int
    device_id: int | None
    opened_at: float = 0.0
    heard_at: float = 0.0
    address: str = "127.0.0.1:1"
    messages: int = 0
    token_hash: str = ""
    closed: list[tuple[int, str]] = field(default_factory=list)

    def push(self, data: bytes) -> bool:
        return True

    def close(self, code: CloseCode, reason: str = "") -> None:
        self.closed.append((code, reason))


def roster_of(*guests: Guest) -> Roster:
    hub: Hub[Member] = Hub()
    for guest in guests:
        for group in groups_of(guest.user_id, guest.device_id):
            hub.join(group, guest)
    return Roster(hub, "here")


guests = st.lists(
    st.builds(
        Guest,
        st.text("0123456789abcdef", min_size=1, max_size=6),
        st.integers(0, 12),
        st.none() | st.integers(0, 3),
        st.floats(0, 100),
        st.floats(0, 100),
    ),
    max_size=30,
    unique_by=lambda guest: guest.id,
)


@given(guests, st.none() | st.integers(0, 4), st.none() | st.integers(0, 4), st.booleans())
def test_found_is_who_fits_all_that_is_asked(
    guests: list[Guest], user_id: int | None, device_id: int | None, by_id: bool
) -> None:
    connection_id = guests[0].id if by_id and guests else None
    found = roster_of(*guests).find(
        user_id=user_id, device_id=device_id, connection_id=connection_id
    )
    expected = {
        guest.id
        for guest in guests
        if user_id in (None, guest.user_id)
        and device_id in (None, guest.device_id)
        and connection_id in (None, guest.id)
    }
    assert sorted(guest.id for guest in found) == sorted(expected)


@given(guests, st.integers(1, 8))
def test_the_pages_hold_everybody_once_in_order(guests: list[Guest], limit: int) -> None:
    roster = roster_of(*guests)
    after, ids = "", list[str]()
    while page := roster.page(roster.find(), after, limit):
        assert len(page) <= limit
        ids += [row["id"] for row in page]
        after = ids[-1]
    assert ids == sorted(guest.id for guest in guests)


@given(guests, st.integers(1, 8))
def test_the_pages_of_users_hold_each_user_once_by_number(guests: list[Guest], limit: int) -> None:
    roster, last, rows = roster_of(*guests), -1, []
    while page := roster.users(last, limit):
        assert len(page) <= limit
        rows += page
        last = rows[-1]["user_id"]
    assert [row["user_id"] for row in rows] == sorted({guest.user_id for guest in guests})
    for row in rows:
        own = [guest for guest in guests if guest.user_id == row["user_id"]]
        assert row["connections"] == len(own)
        assert row["instances"] == ["here"]
        since, active = map(datetime.fromisoformat, (row["connected_at"], row["last_activity"]))
        assert active - since > timedelta(milliseconds=-1)
    assert roster.counts() == {
        "connections": len(guests),
        "users": len(rows),
        "devices": len({guest.device_id for guest in guests} - {None}),
    }


def test_who_left_is_not_found() -> None:
    hub: Hub[Member] = Hub()
    guest = Guest("a", 1, None)
    for change in (hub.join, hub.leave):
        for group in groups_of(1, None):
            change(group, guest)
    roster = Roster(hub, "here")
    assert (roster.find(), roster.users(-1, 10)) == ([], [])
    assert roster.counts() == {"connections": 0, "users": 0, "devices": 0}


def test_times_are_of_the_wall_clock() -> None:
    now = monotonic()
    guest = Guest("a", 1, None, opened_at=now - 60, heard_at=now - 5)
    row = roster_of(guest).describe(guest)
    since, active = (
        datetime.fromisoformat(row[name]) for name in ("connected_at", "last_activity")
    )
    assert abs(datetime.now(UTC) - timedelta(seconds=60) - since) < timedelta(seconds=5)
    assert abs((active - since) - timedelta(seconds=55)) < timedelta(seconds=1)
    assert wall(now).endswith("+00:00")


def test_a_device_that_said_nothing_since_its_request_was_active_when_it_came_in() -> None:
    guest = Guest("a", 1, None, opened_at=monotonic(), heard_at=monotonic() - 3)
    row = roster_of(guest).describe(guest)
    assert abs(
        datetime.fromisoformat(row["last_activity"]) - datetime.fromisoformat(row["connected_at"])
    ) < timedelta(milliseconds=10)


async def test_everybody_is_cut_and_others_have_their_turn_meanwhile() -> None:
    everybody = [Guest(f"{number:04}", 1, None) for number in range(3 * BATCH)]
    turns = 0

    def count(again: Callable[[], object]) -> None:
        nonlocal turns
        turns += 1
        again()

    loop = asyncio.get_running_loop()

    def turn() -> None:
        count(lambda: loop.call_soon(turn) if turns < 100 else None)

    loop.call_soon(turn)
    assert await roster_of().cut(everybody, CloseCode.DISCONNECTED, "why") == len(everybody)
    assert all(guest.closed == [(4003, "why")] for guest in everybody)
    assert turns >= 2
