"""What the process does at this moment, for the log: its tasks and its counters.

Only this module knows how a dump reads. It tells functions and lines, never the values they work
with: no token and no message can get into it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import PurePath
from types import CodeType
from typing import Any, Final

from wsgateway.metrics import Metrics

log = logging.getLogger(__name__)

MAX_TASKS: Final = 2000
"""Tasks that are looked at, about 20 ms; how many there are beyond is told."""

MAX_STACKS: Final = 50
"""Different stacks that are told, those of most tasks first."""

MAX_FRAMES: Final = 12
"""Functions told of one stack, the innermost first."""

LINE: Final = 1500
"""Characters of counters in one line."""


def write(metrics: Metrics, counts: Mapping[str, int]) -> None:
    """Write every task's stack, equal ones together, and every counter that is not 0 to the log."""
    for line in (*_tasks(), *_counters(metrics, counts)):
        log.info(line)  # each a template of its own: no line is taken for a repetition


def _tasks() -> Iterator[str]:
    tasks = asyncio.all_tasks()
    stacks = Counter(map(_stack, islice(tasks, MAX_TASKS)))
    beyond = max(0, len(tasks) - MAX_TASKS)
    yield f"dump: tasks={len(tasks)} stacks={len(stacks)} not_looked_at={beyond}"
    for stack, number in stacks.most_common(MAX_STACKS):
        yield f"dump: {number} x {stack}"


def _stack(task: asyncio.Task[Any]) -> str:
    """``name: place in function < place in function ...``, from where the task waits outward."""
    name = "" if task.get_name().startswith("Task-") else f"{task.get_name()}: "
    waits: Any = task.get_coro()
    places: deque[str] = deque(maxlen=MAX_FRAMES)
    while waits is not None:
        frame, code = _frame(waits)
        if code is None:
            places.appendleft(type(waits).__name__)  # a future, or what a library waits for in C
            break
        line = frame.f_lineno if frame is not None else code.co_firstlineno
        places.appendleft(f"{_short(code.co_filename)}:{line} in {code.co_qualname}")
        waits = getattr(waits, "cr_await", None) or getattr(waits, "gi_yieldfrom", None)
    return name + " < ".join(places)


def _frame(waits: Any) -> tuple[Any, CodeType | None]:
    """Where a coroutine or generator stands; (None, None) for what is neither."""
    for frame, code in (("cr_frame", "cr_code"), ("gi_frame", "gi_code"), ("ag_frame", "ag_code")):
        if hasattr(waits, code):
            return getattr(waits, frame), getattr(waits, code)
    return None, None


def _short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(PurePath(path).parts[-2:])


def _counters(metrics: Metrics, counts: Mapping[str, int]) -> Iterator[str]:
    told = [f"{name}={number}" for name, number in counts.items()]
    for field in dataclasses.fields(metrics):
        value = getattr(metrics, field.name)
        if isinstance(value, dict):
            told += [f"{field.name}[{_label(key)}]={item}" for key, item in value.items()]
        elif isinstance(value, int | float) and value:
            told.append(f"{field.name}={value:g}" if value % 1 else f"{field.name}={int(value)}")
    line = "dump:"
    for word in told:
        if len(line) + len(word) > LINE:
            yield line
            line = "dump:"
        line += f" {word}"
    yield line


def _label(key: object) -> str:
    return ",".join(map(str, key)) if isinstance(key, tuple) else str(key)
