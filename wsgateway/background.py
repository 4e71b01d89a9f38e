"""Work that goes on for as long as something is open.

Only this module says how such tasks are owned: a task that fails ends what it belongs to, and every
task is gone when that is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine


@contextlib.asynccontextmanager
async def running(*works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run coroutines beside the body; cancel them when it ends, cancel it when one fails.

    Raises:
        Exception: the one that a coroutine or the body raised, as itself and not in a group.

    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as failures:
        if len(failures.exceptions) == 1:
            raise failures.exceptions[0] from None
        raise
