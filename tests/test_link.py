"""Connections to Redis: what is submitted is answered in order, or known not to have been sent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import msgspec
import pytest
from redis import exceptions

from tests.conftest import RedisServer, eventually
from wsgateway import background, config
from wsgateway.envelope import Fate
from wsgateway.errors import ConfigError
from wsgateway.link import Condition, Deaf, Pipeline, Redis, State, state_of
from wsgateway.metrics import Metrics


@contextlib.asynccontextmanager
async def pipeline(url: str, max_bytes: int = 1000) -> AsyncIterator[tuple[Pipeline, Metrics]]:
    metrics = Metrics()
    settings = msgspec.structs.replace(config.Redis(), url=url, timeout=0.5)
    made = Pipeline(Redis(settings, "here", metrics), "publisher", max_bytes)
    async with background.running(made.run()):
        yield made, metrics


async def test_commands_are_answered_in_the_order_they_were_submitted(
    redis_server: RedisServer,
) -> None:
    async with pipeline(redis_server.url) as (one, _):
        await eventually(lambda: one.condition.is_up)
        outcomes = [one.submit(lambda: [("INCR", "n"), ("ECHO", "x")]) for _ in range(1000)]
        answers = [await outcome for outcome in outcomes]
        assert [answer.replies for answer in answers] == [[n, b"x"] for n in range(1, 1001)]
        [error, fine] = await one.call(("LPUSH", "n", 1), ("GET", "n"))
        assert isinstance(error, Exception)
        assert fine == b"1000"
        names = redis_server.call("CLIENT", "LIST")
        assert "wsgateway:here:publisher" in str(names)


async def test_what_is_not_sent_is_not_built_and_nothing_waits_for_redis(
    redis_server: RedisServer,
) -> None:
    redis_server.stop()
    built: list[int] = []

    def build() -> list[tuple[str, ...]]:
        built.append(1)
        return [("PING",)]

    async with pipeline(redis_server.url) as (one, metrics):
        await eventually(lambda: one.condition.state is State.UNREACHABLE)
        assert one.submit(build).result() == (Fate.NOT_SENT, [])
        with pytest.raises(ConnectionError):
            await one.call(("PING",))
        assert built == []
        redis_server.start()
        await eventually(lambda: one.condition.is_up)
        assert (await one.submit(build)).fate is Fate.TAKEN
        assert metrics.redis_states == {"publisher": State.UP}


async def test_more_than_may_wait_is_refused_and_counted(redis_server: RedisServer) -> None:
    async with pipeline(redis_server.url) as (one, metrics):
        await eventually(lambda: one.condition.is_up)
        outcomes = [one.submit(lambda: [("PING",)], 300) for _ in range(5)]
        fates = [(await outcome).fate for outcome in outcomes]
        assert fates == [Fate.TAKEN] * 3 + [Fate.NOT_SENT] * 2
        assert metrics.redis_overflows == 2
        assert (await one.submit(lambda: [("PING",)], 1000)).fate is Fate.TAKEN


async def test_an_answer_that_does_not_come_in_time_leaves_the_fate_unknown(
    redis_server: RedisServer,
) -> None:
    async with pipeline(redis_server.url) as (one, _):
        await eventually(lambda: one.condition.is_up)
        redis_server.call("CLIENT", "PAUSE", 1500)
        assert (await one.submit(lambda: [("INCR", "n")])).fate is Fate.UNKNOWN
        await eventually(lambda: one.condition.state is State.SILENT)
        await eventually(lambda: one.condition.is_up)
        assert (await one.call(("PING",)))[0] in (True, b"PONG")
        assert redis_server.call("GET", "n") in (None, b"1")  # never twice


@pytest.mark.parametrize("talks", [True, False], ids=["nonsense", "silence"])
async def test_what_is_no_redis_is_called_so(talks: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read(10)
            if talks:
                writer.write(b"220 mail ready\r\n")
            await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, pipeline(f"redis://127.0.0.1:{port}") as (one, _):
        expected = State.GARBAGE if talks else State.SILENT
        await eventually(lambda: one.condition.state is expected)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (exceptions.ConnectionError("refused"), State.UNREACHABLE),
        (OSError(113, "no route"), State.UNREACHABLE),
        (exceptions.TimeoutError(), State.SILENT),
        (TimeoutError(), State.SILENT),
        (exceptions.AuthenticationError("x"), State.NO_AUTH),
        (exceptions.ResponseError("NOAUTH Authentication required."), State.NO_AUTH),
        (exceptions.ResponseError("WRONGPASS invalid"), State.NO_AUTH),
        (exceptions.NoPermissionError("x"), State.NO_PERMISSION),
        (exceptions.BusyLoadingError("x"), State.LOADING),
        (exceptions.ReadOnlyError("x"), State.READ_ONLY),
        (exceptions.OutOfMemoryError("x"), State.OUT_OF_MEMORY),
        (exceptions.ConnectionError("max number of clients reached"), State.MAX_CLIENTS),
        (exceptions.InvalidResponse("Protocol Error"), State.GARBAGE),
        (exceptions.ResponseError("ERR what"), State.REFUSED),
        (Deaf(), State.DEAF),
    ],
)
def test_each_failure_has_a_name(error: BaseException, state: State) -> None:
    assert state_of(error) is state


def test_a_state_is_one_line_of_the_log_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wsgateway")
    metrics = Metrics()
    condition = Condition("publisher", metrics)
    for state in (State.SILENT, State.SILENT, State.UP, State.UP, State.NO_AUTH):
        condition.set(state)
        assert metrics.redis_states == {"publisher": state}
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO", "ERROR"]


@pytest.mark.parametrize("url", ["http://x:secret@y/", "redis://u:secret@h:port/0", "secret"])
def test_a_url_that_cannot_be_read_is_an_error_that_hides_the_password(url: str) -> None:
    settings = msgspec.structs.replace(config.Redis(), url=url)
    with pytest.raises(ConfigError) as caught:
        Redis(settings, "here", Metrics())
    assert "secret" not in str(caught.value)
