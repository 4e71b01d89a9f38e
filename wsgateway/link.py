"""Connections to Redis that notice when they are dead, and come back.

Only this module imports redis and says what state it is in. It knows neither groups nor devices.

Every exchange has a deadline of ours: redis-py's own retries repeat commands that were applied, its
PubSub freezes the loop after a network cut, and its health check sends pings without looking at the
pongs. So there are no retries, no PubSub and no pool here; a connection that failed is dropped, and
another one is made after a random pause, for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from redis import exceptions
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from wsgateway import config
from wsgateway.envelope import Fate
from wsgateway.errors import ConfigError
from wsgateway.metrics import Metrics

log = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 4.0
"""Seconds between two tries are drawn from 0 to a limit that doubles from the first to the longest,
so that instances do not come back as one, and yet each is back within 6 s of Redis."""

COMMANDS_PER_EXCHANGE: Final = 256
"""Submissions joined into one write: where the cost per command stops falling."""

KEEPALIVE: Final = {
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 3,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 10_000,  # milliseconds
}
"""A link that was cut is noticed by the kernel within 20 s, also while bytes are under way, which
stops the keepalive. Our own deadlines are shorter; this is the second line."""

Connection = AbstractConnection
Command = Sequence[bytes | str | int | float]
Reply = Any
"""What Redis answered: bytes, int, list, None, or an Exception for an error reply."""


class State(enum.StrEnum):
    """How a connection to Redis stands; each is a metric and a log line."""

    CONNECTING = "connecting"
    UP = "up"
    UNREACHABLE = "unreachable"
    SILENT = "silent"
    NO_AUTH = "no_auth"
    NO_PERMISSION = "no_permission"
    LOADING = "loading"
    READ_ONLY = "read_only"
    OUT_OF_MEMORY = "out_of_memory"
    MAX_CLIENTS = "max_clients"
    GARBAGE = "garbage"
    REFUSED = "refused"
    DEAF = "deaf"


ADVICE: Final = {
    State.UNREACHABLE: "is it running, and is redis.url right?",
    State.SILENT: "it does not answer in time",
    State.NO_AUTH: "user or password in redis.url are wrong or missing",
    State.NO_PERMISSION: "its ACL forbids what the gateway needs",
    State.LOADING: "it is loading its data",
    State.READ_ONLY: "it is a replica: redis.url must name the master",
    State.OUT_OF_MEMORY: "its maxmemory is used up",
    State.MAX_CLIENTS: "its maxclients is used up",
    State.GARBAGE: "what answers is no Redis",
    State.REFUSED: "it does not do what is asked",
    State.DEAF: "what is published does not come back",
}


class Deaf(Exception):
    """What was published did not come back."""


class Away(Exception):
    """An exchange with Redis failed; ``state`` says how."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.state = state


def state_of(error: BaseException) -> State:
    """The state that an error, or an error reply, says Redis is in."""
    kinds: tuple[tuple[type[BaseException], State], ...] = (
        (Deaf, State.DEAF),
        (exceptions.AuthenticationError, State.NO_AUTH),
        (exceptions.BusyLoadingError, State.LOADING),
        (exceptions.MaxConnectionsError, State.MAX_CLIENTS),
        (exceptions.NoPermissionError, State.NO_PERMISSION),
        (exceptions.ReadOnlyError, State.READ_ONLY),
        (exceptions.OutOfMemoryError, State.OUT_OF_MEMORY),
        (exceptions.TimeoutError, State.SILENT),
        (TimeoutError, State.SILENT),
        (exceptions.InvalidResponse, State.GARBAGE),
        (exceptions.ResponseError, State.REFUSED),
    )
    text = str(error)
    if "max number of clients" in text:
        return State.MAX_CLIENTS
    if text.startswith(("NOAUTH", "WRONGPASS")) or "Authentication required" in text:
        return State.NO_AUTH
    if text.startswith("Protocol error"):
        return State.GARBAGE
    return next((state for kind, state in kinds if isinstance(error, kind)), State.UNREACHABLE)


class Condition:
    """The state of one connection, told to the log and the metrics when it changes."""

    def __init__(self, role: str, metrics: Metrics) -> None:
        self._role = role
        self._metrics = metrics
        self.state = State.CONNECTING
        metrics.redis_states[role] = self.state

    @property
    def is_up(self) -> bool:
        return self.state is State.UP

    def set(self, state: State) -> None:
        """Note a state; a change is one log line."""
        if state is self.state:
            return
        self.state = state
        self._metrics.redis_states[self._role] = state
        if state is State.UP:
            log.info("redis up connection=%s", self._role)
        elif state in ADVICE:
            log.error("redis %s connection=%s: %s", state, self._role, ADVICE[state])


class Redis:
    """Where Redis is, and how to connect to it."""

    def __init__(self, settings: config.Redis, instance: str, metrics: Metrics) -> None:
        """Read the URL; nothing is connected yet. Raises ConfigError."""
        self._instance = instance
        self.metrics = metrics
        self.timeout = settings.timeout
        try:
            self._pool = ConnectionPool.from_url(
                settings.url,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                # Set, redis-py would use wait_for(), which swallows cancelling on Python 3.11.
                socket_timeout=None,
                socket_connect_timeout=None,
                health_check_interval=0,
                decode_responses=False,
                driver_info=None,
                **(
                    {}
                    if settings.url.startswith("unix:")
                    else {"socket_keepalive": True, "socket_keepalive_options": KEEPALIVE}
                ),
            )
        except (ValueError, TypeError):  # whose text would show the password
            raise ConfigError("redis.url: cannot be understood") from None

    @contextlib.asynccontextmanager
    async def connected(self, role: str) -> AsyncIterator[Connection]:
        """A connection of our own; dropped when leaving, however that happens.

        Raises:
            RedisError, OSError, TimeoutError: see `state_of`.

        """
        self._pool.connection_kwargs["client_name"] = f"wsgateway:{self._instance}:{role}"
        connection: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(self.timeout):
                await connection.connect()  # type: ignore[no-untyped-call]
            yield connection
        finally:
            await connection.disconnect(nowait=True)

    async def ask(self, role: str, *commands: Command) -> list[Reply]:
        """One exchange over a connection of its own; error replies are returned.

        Raises:
            Away: Redis did not answer all of it.

        """
        try:
            async with self.connected(role) as connection, asyncio.timeout(self.timeout):
                packed = connection.pack_commands(commands)
                await connection.send_packed_command(packed, check_health=False)
                return [await _reply(connection) for _ in commands]
        except (exceptions.RedisError, OSError, TimeoutError, RuntimeError) as error:
            raise Away(state_of(error)) from None


async def stay(condition: Condition, session: Callable[[], Awaitable[None]]) -> None:
    """Run sessions with Redis for ever: each ends with an error, another begins after a pause.

    Cancelling is safe and ends it.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            await session()
        except BaseExceptionGroup as failures:
            others = failures.split(asyncio.CancelledError)[1]
            if others is None:
                raise
            error: BaseException = others
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
        except Exception as failure:  # noqa: BLE001 - nobody above could mend it
            error = failure
        if condition.is_up:
            pause = FIRST_PAUSE
        state = state_of(error)
        if state is State.UNREACHABLE and not isinstance(error, exceptions.RedisError | OSError):
            log.error("a session with redis failed", exc_info=error)
        condition.set(state)
        await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - spreads, hides nothing
        pause = min(LONGEST_PAUSE, pause * 2)


class Outcome(NamedTuple):
    """What became of commands, with the replies where Redis answered."""

    fate: Fate
    replies: list[Reply]


class _Submission(NamedTuple):
    build: Callable[[], Sequence[Command]]
    size: int
    outcome: asyncio.Future[Outcome]


class Pipeline:
    """Commands over one connection, in the order they were submitted, joined per turn.

    Nothing waits for a Redis that is away: what is submitted then is not sent, and nothing is sent
    twice. At most ``max_bytes`` wait.
    """

    def __init__(self, redis: Redis, role: str, max_bytes: int) -> None:
        self._redis = redis
        self._role = role
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: deque[_Submission] = deque()
        self._arrived = asyncio.Event()
        self.condition = Condition(role, redis.metrics)
        self._open = False

    def submit(
        self, build: Callable[[], Sequence[Command]], size: int = 0
    ) -> asyncio.Future[Outcome]:
        """Send commands; what became of them. Never waits.

        ``build`` makes them when they are written, so that what was not sent took no number of a
        sequence; ``size`` is about how many bytes they take.
        """
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if not self._open:
            outcome.set_result(Outcome(Fate.NOT_SENT, []))
        elif self._bytes + size > self._max_bytes:
            self._redis.metrics.redis_overflows += 1
            outcome.set_result(Outcome(Fate.NOT_SENT, []))
        else:
            self._bytes += size
            self._waiting.append(_Submission(build, size, outcome))
            self._arrived.set()
        return outcome

    async def call(self, *commands: Command) -> list[Reply]:
        """Send commands and wait for the replies.

        Raises:
            ConnectionError: Redis is away, or did not answer; a reply that is an error is returned.

        """
        outcome = await self.submit(lambda: commands)
        if outcome.fate is not Fate.TAKEN:
            raise ConnectionError(outcome.fate.value)
        return outcome.replies

    async def run(self) -> None:
        """Connect, exchange, and connect again, for ever."""
        await stay(self.condition, self._session)

    async def _session(self) -> None:
        async with self._redis.connected(self._role) as connection:
            self._open = True
            self.condition.set(State.UP)
            try:
                while True:
                    await self._arrived.wait()
                    self._arrived.clear()
                    while self._waiting:
                        if await connection.can_read():  # nobody asked anything: it is the end
                            raise exceptions.ConnectionError("closed by redis")
                        await self._exchange(connection)
            finally:
                self._open = False
                while self._waiting:
                    self._settle(self._waiting.popleft(), Outcome(Fate.NOT_SENT, []))

    async def _exchange(self, connection: Connection) -> None:
        """Write what waits, and read the answers."""
        number = min(len(self._waiting), COMMANDS_PER_EXCHANGE)
        batch = deque(self._waiting.popleft() for _ in range(number))
        built = deque(submission.build() for submission in batch)
        packed = connection.pack_commands([command for part in built for command in part])
        fate = Fate.UNKNOWN
        try:
            async with asyncio.timeout(self._redis.timeout):
                await connection.send_packed_command(packed, check_health=False)
                while batch:
                    replies = [await _reply(connection) for _ in built[0]]
                    built.popleft()
                    self._settle(batch.popleft(), Outcome(Fate.TAKEN, replies))
        except RuntimeError:  # what uvloop raises for a transport that was closed
            raise exceptions.ConnectionError("closed") from None
        except (exceptions.BusyLoadingError, exceptions.AuthenticationError):
            fate = Fate.REFUSED
            raise
        finally:
            for submission in batch:
                self._settle(submission, Outcome(fate, []))

    def _settle(self, submission: _Submission, outcome: Outcome) -> None:
        self._bytes -= submission.size
        if not submission.outcome.done():
            submission.outcome.set_result(outcome)


async def _reply(connection: Connection) -> Reply:
    try:
        return await connection.read_response()
    except exceptions.ReadOnlyError:
        raise  # a demoted master: another connection may lead to the new one
    except exceptions.ResponseError as error:
        return error
