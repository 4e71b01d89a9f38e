"""Handshakes wait when the loop is behind, in their order, and are refused only if that took too long."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Accounts, Instance, eventually, running_gateway
from tests.test_device_socket import UNAVAILABLE, Answer, peer, request
from wsgateway.gate import FIRST_BATCH, LARGEST_BATCH, LEAST_BATCH, Gate
from wsgateway.metrics import Metrics

LATE, IN_TIME, LIMIT = 0.5, 0.01, 0.1


class Crowd:
    """A gate and who waits at it."""

    def __init__(self) -> None:
        self.gate = Gate(Metrics())
        self.tasks: list[asyncio.Task[bool]] = []

    def tick(self, lag: float, wait_limit: float = 3600) -> None:
        self.gate.tick(lag, LIMIT, wait_limit)

    async def come(self, count: int) -> None:
        self.tasks += [asyncio.create_task(self.gate.enter()) for _ in range(count)]
        await asyncio.sleep(0)

    async def went_on(self) -> list[int]:
        """The numbers of those who did, and that nobody was refused."""
        await asyncio.sleep(0)
        assert all(task.result() for task in self.tasks if task.done())
        return [number for number, task in enumerate(self.tasks) if task.done()]

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_nobody_waits_while_the_loop_keeps_up() -> None:
    crowd = Crowd()
    for _ in range(3):
        crowd.tick(IN_TIME)
        await crowd.come(5000)
    assert len(await crowd.went_on()) == 15_000


async def test_after_a_late_tick_the_oldest_go_on_more_with_each_tick_in_time() -> None:
    crowd = Crowd()
    crowd.tick(LATE)
    await crowd.come(FIRST_BATCH * 8)
    assert await crowd.went_on() == []
    for count in (FIRST_BATCH * 2, FIRST_BATCH * 6, FIRST_BATCH * 8):
        crowd.tick(IN_TIME)
        assert await crowd.went_on() == list(range(count))
    crowd.tick(IN_TIME)
    assert crowd.gate.is_open


@given(lags=st.lists(st.sampled_from([LATE, IN_TIME]), max_size=30))
def test_every_tick_lets_some_go_on_and_never_too_many(lags: list[float]) -> None:
    async def check() -> None:
        crowd = Crowd()
        crowd.tick(LATE)
        await crowd.come(500)
        for lag in lags:
            before = len(await crowd.went_on())
            crowd.tick(lag)
            went = len(await crowd.went_on()) - before
            assert min(LEAST_BATCH, 500 - before) <= went <= LARGEST_BATCH
            assert crowd.gate.is_open <= (before + went == 500)
        await crowd.leave()

    asyncio.run(check())


async def test_who_waited_too_long_is_refused_and_who_gave_up_is_not_missed() -> None:
    crowd = Crowd()
    crowd.tick(LATE)
    await crowd.come(FIRST_BATCH + LEAST_BATCH)
    crowd.tasks[0].cancel()
    crowd.tick(LATE, wait_limit=0)
    done = await asyncio.gather(*crowd.tasks, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    half = FIRST_BATCH // 2
    assert done[1:] == [True] * (half - 1) + [False] * (half + LEAST_BATCH)


async def come_late(gateway: Instance) -> Answer:
    """What a device is answered that comes when 400 others wait for a loop that is behind."""
    gate = gateway.running.instance.listener._gate
    async with peer(gateway) as client, peer(gateway) as curious:
        for _ in range(2):
            gate.tick(LATE, LIMIT, 3600)
        others = [asyncio.create_task(gate.enter()) for _ in range(2 * FIRST_BATCH)]
        await asyncio.sleep(0)
        client.send(request(f"/ws/device/?token={gateway.token}"))
        curious.send(request("/healthz", upgrade=()))
        assert (await curious.answer()).status == 200, "a health check never waits"
        answer = await client.answer()
        await asyncio.gather(*others)
    await eventually(lambda: gate.is_open)
    return answer


async def test_a_device_that_comes_while_the_loop_is_behind_waits_and_is_let_in(
    accounts: Accounts,
) -> None:
    async with running_gateway(accounts) as gateway:
        assert (await come_late(gateway)).status == 101
        assert gateway.running.instance.metrics.gate_delayed == 2 * FIRST_BATCH + 1


async def test_a_device_that_would_wait_too_long_is_to_come_again(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__handshake_wait=0) as gateway:
        async with asyncio.timeout(30):
            # On a busy machine the others may be through before it has come.
            while (answer := await come_late(gateway)).status != 503:
                pass
        assert answer.body == UNAVAILABLE
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert gateway.running.instance.metrics.refused == {"overload": 1}
