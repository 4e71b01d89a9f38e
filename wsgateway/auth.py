"""Who a token stands for, asked without ever harming the loop or the database.

Only this module decides whether a token opens the device socket. It knows neither sockets nor SQL.
Look-ups that arrive while one query runs share the next one, so that at most one query waits in the
database's thread, however many clients come and however slow the disk is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Container, Iterable
from pathlib import Path
from typing import Final, Literal, NamedTuple

from wsgateway import background, config, store
from wsgateway.errors import Refused, StoreBusy, StoreError
from wsgateway.metrics import Metrics
from wsgateway.store import Store, TokenRow

log = logging.getLogger(__name__)

MAX_TOKEN_LENGTH: Final = 256
"""Characters; ours have 47, Django's 40. Longer texts are not even hashed."""

BATCH: Final = 100
"""Look-ups per query: where the cost per look-up stops falling."""

RETRY_AFTER: Final = 2
"""Seconds that a client refused for the gateway's own trouble is asked to wait."""

GATHER_SECONDS: Final = 0.005
"""How long look-ups that do not fill a query wait for others: to ask the database's thread costs
about as much as ten look-ups do."""

MAX_CALLERS: Final = 1000
"""Keys of the HTTP API remembered, for ``cache_ttl``."""

DEADLINE_STEP: Final = 0.1
"""Seconds between two looks at who waited too long."""

RETRY_PAUSE: Final = 0.05
"""Seconds between two tries at a locked database."""


class Identity(NamedTuple):
    """Whom a token stands for. ``expires_at`` is in seconds since 1970, or None.

    The token is named by its hash in whatever is asked of the database later: a file that replaced
    it numbers other tokens.

    ``epoch`` counts the database files that were opened: a token that a *replaced* file does not
    know was not revoked, while one that vanished from the same file was.
    """

    token_id: int
    token_hash: str
    user_id: int
    device_id: int | None
    expires_at: int | None
    epoch: int


class Caller(NamedTuple):
    """Who calls the HTTP API: the user's or the key's name, and what he may do."""

    name: str
    scope: str
    who: str  # whose sends are repeated: told apart where names are the same


def new_token() -> str:
    """A token with 256 random bits."""
    return f"wsg_{secrets.token_urlsafe(32)}"


def hash_token(token: str) -> str:
    """What is stored of a token. 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def ended(row: TokenRow | None, now: float, scopes: Container[str] = ("device",)) -> str | None:
    """Why a token is not good for these scopes at ``now`` (seconds since 1970), or None."""
    if row is None:
        return "unknown"
    if row.revoked_at is not None:
        return "revoked"
    if row.expires_at is not None and row.expires_at <= now:
        return "expired"
    if not row.user_active:
        return "disabled"
    return None if row.scope in scopes else "scope"


class _LookUp(NamedTuple):
    """A token that is being looked up, for all who wait for it."""

    deadline: float
    answers: list[asyncio.Future[TokenRow | None]]

    def answer(self, row: TokenRow | None) -> None:
        for answer in self.answers:
            if not answer.done():  # a client that left has cancelled its own
                answer.set_result(row)

    def give_up(self) -> None:
        for answer in self.answers:
            if not answer.done():
                answer.set_exception(Refused("database", RETRY_AFTER))


class Authenticator:
    """Answers whom a token stands for, from a short-lived cache or the database."""

    def __init__(self, settings: config.Auth, path: Path, metrics: Metrics) -> None:
        self._settings = settings
        self._path = path
        self._metrics = metrics
        self._store: Store | None = None
        self._exit = contextlib.AsyncExitStack()
        self._epoch = 0
        self._in_flight = 0
        self.changes_noticed = 0
        """Times that the database changed, or was lost, since the start."""
        self._seen_changes = 0
        self._damaged = False
        self._waiting: dict[str, _LookUp] = {}  # oldest first
        self._arrived = asyncio.Event()
        self._cache: OrderedDict[str, tuple[float, Identity]] = OrderedDict()
        self._callers: dict[str, tuple[float, Caller]] = {}

    def configure(self, config: config.Config) -> None:
        """Answer from now on as another configuration says, and remember nothing from before."""
        self._settings = config.auth
        self.forget()

    @property
    def usable(self) -> bool:
        """Whether the database answers: without it nobody is admitted, and nobody is cut."""
        return self._store is not None and not self._damaged and self._store.intact()

    async def identify(self, token: str) -> Identity:
        """Whom a token stands for.

        Raises:
            Refused: with the reason; with ``retry_after`` if the database did not answer in time.

        """
        if not self.usable:
            raise Refused("database", RETRY_AFTER)
        if len(token) > MAX_TOKEN_LENGTH:
            raise Refused("unknown")
        token_hash = hash_token(token)
        cached = self._cache.get(token_hash)
        if cached is not None and cached[0] > time.monotonic():
            if cached[1].expires_at is not None and cached[1].expires_at <= time.time():
                raise Refused("expired")
            self._metrics.lookups["cache"] += 1
            return cached[1]
        started = time.perf_counter()
        try:
            row = await self._check(token_hash, ("device",))
        finally:
            self._metrics.lookup_seconds.note("database", time.perf_counter() - started)
        identity = Identity(
            row.id, row.hash, row.user_id, row.device_id, row.expires_at, self._epoch
        )
        self._remember(token_hash, identity)
        return identity

    async def caller(self, token: str) -> Caller:
        """Who calls the HTTP API with a token of scope api or admin. Raises Refused, as above."""
        if not self.usable:
            raise Refused("database", RETRY_AFTER)
        if len(token) > MAX_TOKEN_LENGTH:
            raise Refused("unknown")
        token_hash = hash_token(token)
        known = self._callers.get(token_hash)
        if known is not None and known[0] > time.time():
            return known[1]
        row = await self._check(token_hash, ("api", "admin"))
        caller = Caller(row.user_name, row.scope, f"user {row.user_id}")
        if len(self._callers) >= MAX_CALLERS:
            self._callers.clear()
        until = time.time() + self._settings.cache_ttl
        self._callers[token_hash] = (min(until, row.expires_at or until), caller)
        return caller

    async def exists(self, kind: Literal["user", "device"], number: int) -> bool:
        """Whether there is such a user or device. Raises StoreError."""
        if self._store is None:
            raise StoreError("the token database is not open")
        return await self._store.exists(kind, number)

    async def changed(self, identities: Iterable[Identity]) -> dict[Identity, str]:
        """Which of these may not stay as they are, and why.

        The reason is one of `ended`, or 'device' if the token now stands for another device.

        Raises:
            StoreError: the database cannot say; nobody is to be cut for that.

        """
        asked = list(identities)
        now = time.time()
        found = {}
        for start in range(0, len(asked), BATCH):
            if self._store is None:
                raise StoreError("the token database is not open")
            part = asked[start : start + BATCH]
            rows = await self._store.tokens_by_hash([one.token_hash for one in part])
            for identity in part:
                reason = self._compare(identity, rows.get(identity.token_hash), now)
                if reason:
                    found[identity] = reason
        return found

    @contextlib.asynccontextmanager
    async def running(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Open the database and answer; ``on_change`` is called after it was changed or replaced.

        Raises:
            StoreError: of the first opening, in one line. Later the database may come and go.

        """
        async with self._exit:
            await self._open()
            async with background.running(
                self._answer_look_ups(), self._give_up_late(), self._watch(on_change)
            ):
                yield

    def forget(self) -> None:
        """Answer the next question about every token from the database."""
        self.changes_noticed += 1
        self._cache.clear()
        self._callers.clear()

    async def _check(self, token_hash: str, scopes: Container[str]) -> TokenRow:
        """The token with that hash, if it is good for one of the scopes. Raises Refused."""
        row, changes = None, -1
        while changes != self.changes_noticed:
            # A change that is noticed while the look-up is under way may be newer than its answer,
            # and the connection is not there yet to be compared with it.
            changes = self.changes_noticed
            row = await self._look_up(token_hash)
        reason = ended(row, time.time(), scopes)
        if row is None or not hmac.compare_digest(row.hash, token_hash) or reason:
            raise Refused(reason or "unknown")
        return row

    async def _look_up(self, token_hash: str) -> TokenRow | None:
        if self._in_flight >= self._settings.max_lookups:
            raise Refused("lookups", RETRY_AFTER)
        look_up = self._waiting.get(token_hash)
        if look_up is None:
            deadline = time.monotonic() + self._settings.lookup_timeout
            look_up = self._waiting[token_hash] = _LookUp(deadline, [])
            self._arrived.set()
        answer: asyncio.Future[TokenRow | None] = asyncio.get_running_loop().create_future()
        look_up.answers.append(answer)
        self._in_flight += 1
        try:
            return await answer
        finally:
            self._in_flight -= 1

    async def _answer_look_ups(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                if len(self._waiting) < BATCH:
                    await asyncio.sleep(GATHER_SECONDS)
                batch = [hash_ for hash_, _ in zip(self._waiting, range(BATCH), strict=False)]
                try:
                    if self._store is None:
                        raise StoreError("the token database is not open")
                    rows = await self._store.tokens_by_hash(batch)
                except StoreError as error:
                    self._damaged = self._damaged or not isinstance(error, StoreBusy)
                    await asyncio.sleep(
                        RETRY_PAUSE
                    )  # paces the tries; those who wait have a deadline
                    continue
                self._metrics.lookups["database"] += len(batch)
                for token_hash in batch:
                    look_up = self._waiting.pop(token_hash, None)
                    if look_up is not None:
                        look_up.answer(rows.get(token_hash))

    async def _give_up_late(self) -> None:
        """Refuse those who waited too long; one timer for all, as there may be thousands."""
        while True:
            await asyncio.sleep(DEADLINE_STEP)
            now = time.monotonic()
            late = [hash_ for hash_, each in self._waiting.items() if each.deadline <= now]
            for token_hash in late:
                self._metrics.lookups["failed"] += 1
                self._waiting.pop(token_hash).give_up()

    async def _watch(self, on_change: Callable[[], None]) -> None:
        """Notice changes by other processes, and open the database again when it was lost."""
        lost = False
        while True:
            await asyncio.sleep(self._settings.poll_interval)
            try:
                reopen = not self.usable
                if reopen:
                    await self._open()
                assert self._store is not None
                changes = await self._store.change_count()
            except StoreError as error:
                if not lost:
                    log.error("token database lost, new connections get 503: %s", error)
                lost = True
                self.forget()
                continue
            if lost:
                log.warning("token database back path=%s", self._path)
                lost = False
            if reopen or changes != self._seen_changes:
                self._seen_changes = changes
                self.forget()
                on_change()

    async def _open(self) -> None:
        self._store = None
        await self._exit.aclose()
        self._store = await self._exit.enter_async_context(store.open_store(self._path))
        self._seen_changes = await self._store.change_count()
        self._damaged = False
        self._epoch += 1
        self.forget()

    def _remember(self, token_hash: str, identity: Identity) -> None:
        if self._settings.cache_ttl <= 0:
            return
        self._cache[token_hash] = (time.monotonic() + self._settings.cache_ttl, identity)
        if len(self._cache) > self._settings.cache_size:
            self._cache.popitem(last=False)

    def _compare(self, identity: Identity, row: TokenRow | None, now: float) -> str | None:
        if row is None and identity.epoch != self._epoch:
            return None  # a file that replaced the one it was admitted by says nothing of it
        reason = ended(row, now)
        if reason is None and row is not None and row.device_id != identity.device_id:
            reason = "device"
        return reason
