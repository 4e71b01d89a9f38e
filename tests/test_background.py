"""Tasks that belong to something end with it, and it ends with them."""

from __future__ import annotations

import asyncio

import pytest

from wsgateway import background


async def forever() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise LookupError("work")


async def test_tasks_end_with_the_body() -> None:
    before = asyncio.all_tasks()
    async with background.running(forever(), forever()):
        assert len(asyncio.all_tasks()) == len(before) + 2
    assert asyncio.all_tasks() == before


async def test_the_bodys_failure_is_raised_as_itself() -> None:
    with pytest.raises(KeyError):
        async with background.running(forever()):
            raise KeyError("body")


async def test_a_task_that_fails_ends_the_body_and_is_raised_as_itself() -> None:
    with pytest.raises(LookupError):
        async with background.running(forever(), fails()):
            await forever()


async def test_cancelling_the_body_is_still_a_cancellation() -> None:
    async def body() -> None:
        async with background.running(forever()):
            await forever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
