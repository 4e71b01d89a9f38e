"""Readiness names every reason why an instance should get no devices, on both ports."""

from __future__ import annotations

import os
import resource
import time
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession

from tests.conftest import Accounts, Instance, RedisServer, eventually, running_gateway
from tests.test_device_socket import fetch, request

READY = {"status": "ok", "reasons": []}


async def readiness(gateway: Instance) -> tuple[int, dict[str, Any]]:
    """What /readyz says on both ports."""
    answer = await fetch(gateway, request("/readyz", upgrade=()))
    document = orjson.loads(answer.body)
    async with (
        ClientSession() as session,
        session.get(f"{gateway.api_url}/readyz") as reply,
        session.get(f"{gateway.api_url}/healthz") as alive,
    ):
        assert (reply.status, await reply.json()) == (answer.status, document)
        assert alive.status == 200
    return answer.status, document


async def test_an_instance_that_could_take_devices_says_so(gateway: Instance) -> None:
    assert await readiness(gateway) == (200, READY)


async def test_a_loop_that_was_blocked_is_told_for_a_while(accounts: Accounts) -> None:
    async with running_gateway(accounts, limits__loop_lag=0.5) as gateway:
        time.sleep(1.5)  # as a handler that blocks
        health = gateway.running.instance.health
        await eventually(lambda: health.lag > 0.5)
        assert await readiness(gateway) == (
            503, {"status": "unavailable", "reasons": ["loop_lag"]},
        )  # fmt: skip
        await eventually(lambda: health.lag < 0.5, 20)
        assert await readiness(gateway) == (200, READY)


async def test_a_lack_of_descriptors_is_told(accounts: Accounts) -> None:
    async with running_gateway(accounts) as gateway:
        soft = 64 + len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
            assert gateway.running.instance.health.readiness()["reasons"] == []
            while len(taken) < 40:
                taken.append(os.open("/", os.O_PATH))
            assert gateway.running.instance.health.readiness() == {
                "status": "unavailable", "reasons": ["descriptors"],
            }  # fmt: skip
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in taken:
                os.close(descriptor)


@pytest.mark.faults
async def test_a_deaf_mirror_is_told_and_matters_only_where_it_is_required(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    shared: dict[str, object] = {"redis__url": redis_server.url}
    async with (
        running_gateway(accounts, server__instance="a", **shared) as tolerant,
        running_gateway(accounts, server__instance="b", redis__required=True, **shared) as strict,
    ):
        both = (tolerant, strict)
        mirrors = [one.running.instance.gateway for one in both]
        redis_server.stop()
        await eventually(lambda: min(one.mirror_silence for one in mirrors) > 9, 30)
        assert [await readiness(one) for one in both] == [(200, READY)] * 2
        await eventually(lambda: min(one.mirror_silence for one in mirrors) > 10, 30)
        assert [await readiness(one) for one in both] == [
            (200, {"status": "degraded", "reasons": ["redis"]}),
            (503, {"status": "unavailable", "reasons": ["redis"]}),
        ]
        redis_server.start()
        await eventually(lambda: max(one.mirror_silence for one in mirrors) < 2, 30)
        assert [await readiness(one) for one in both] == [(200, READY)] * 2


async def test_before_it_refuses_newcomers_it_says_for_a_while_that_it_will(
    accounts: Accounts,
) -> None:
    async with running_gateway(accounts, drain__delay=2.0) as gateway:
        gateway.stop.set()
        await eventually(lambda: gateway.running.instance.health.leaving)
        assert await readiness(gateway) == (
            503, {"status": "unavailable", "reasons": ["draining"]},
        )  # fmt: skip
        async with gateway.device() as device:
            await device.wait_closed()
            assert device.close_code == 1012
