"""What a call of the HTTP API is: declared once, found by its path.

Only this module knows how calls are declared. A call is a coroutine function that takes the `Api`
and a `Call`, whose query and body were read as the declaration says, and returns the ``data`` of the
answer or a whole `Answer`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from wsgateway.auth import Caller

Q = TypeVar("Q")
B = TypeVar("B")


class NoQuery(msgspec.Struct, frozen=True):
    """A call without query parameters."""


@dataclass(slots=True)
class Call(Generic[Q, B]):
    """One request, read and checked."""

    caller: Caller
    path: dict[str, str]
    query: Q
    body: B
    idempotency_key: str | None

    def number(self, name: str) -> int:
        """A number of the path, which the declaration has checked."""
        return int(self.path[name])


class Answer(NamedTuple):
    """An answer of other shape than ``{"status", "message", "data"}``; ``body`` is JSON-able."""

    body: dict[str, Any]


Function = Callable[[Any, Call[Any, Any]], Awaitable[Any]]


@dataclass(frozen=True)
class Route:
    """A call's declaration. ``errors`` are statuses besides those that every call can have."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    function: Function
    scope: Literal["api", "admin", "none"]
    summary: str
    query: Any = NoQuery
    body: Any = None
    errors: tuple[int, ...] = ()
    tag: str = ""
    parameters: tuple[str, ...] = field(default=())


ROUTES: list[Route] = []
"""Every call, in the order of its declaration; filled when the modules below are imported."""


def route(
    method: Literal["GET", "POST", "DELETE"],
    path: str,
    *,
    scope: Literal["api", "admin"] = "api",
    query: Any = NoQuery,
    body: Any = None,
    errors: tuple[int, ...] = (),
) -> Callable[[Function], Function]:
    """Declare the function that answers a call; its docstring's first line is the summary."""

    def declare(function: Function) -> Function:
        names = tuple(part[1:-1] for part in path.split("/") if part.startswith("{"))
        ROUTES.append(
            Route(
                method,
                path,
                function,
                scope,
                (function.__doc__ or "").splitlines()[0],
                query,
                body,
                errors,
                path.split("/")[2],
                names,
            )
        )
        return function

    return declare
