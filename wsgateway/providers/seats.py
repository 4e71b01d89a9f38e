"""How many requests may be under way: in all, and for one user.

Only this module makes a request wait for its turn. It knows neither services nor devices.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator


class Seats:
    """``total`` seats, ``per_user`` of them for one user at most; whoever comes first sits first."""

    def __init__(self, total: int, per_user: int) -> None:
        self._all = asyncio.Semaphore(total)
        self._per_user = per_user
        self._users: dict[int, tuple[asyncio.Semaphore, int]] = {}  # with who sits or waits

    @contextlib.asynccontextmanager
    async def taken(self, user_id: int, seconds: float) -> AsyncIterator[None]:
        """Sit, after waiting at most so many seconds. Cancelling is safe.

        Raises:
            TimeoutError: no seat became free in time.

        """
        async with contextlib.AsyncExitStack() as stack:
            own = stack.enter_context(self._of(user_id))
            async with asyncio.timeout(seconds):
                # The user's first: who waits for that must not keep a seat from others.
                await stack.enter_async_context(own)
                await stack.enter_async_context(self._all)
            yield

    @contextlib.contextmanager
    def _of(self, user_id: int) -> Iterator[asyncio.Semaphore]:
        """The seats of a user, which exist for as long as anybody sits there or waits."""
        seats, people = self._users.get(user_id) or (asyncio.Semaphore(self._per_user), 0)
        self._users[user_id] = (seats, people + 1)
        try:
            yield seats
        finally:
            people = self._users[user_id][1] - 1
            if people:
                self._users[user_id] = (seats, people)
            else:
                del self._users[user_id]

    def __len__(self) -> int:
        """Users who sit or wait."""
        return len(self._users)
