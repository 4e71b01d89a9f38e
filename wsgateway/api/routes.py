"""What a call of the HTTP API is: declared once, found by its path.

Only this module knows how calls are declared. A call is a coroutine function that takes the `Api`
and a `Call`, whose query and body were read as the declaration says, and returns the ``data`` of the
answer or a whole `Answer`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from wsgateway.auth import Caller

Q = TypeVar("Q")
B = TypeVar("B")


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    """A call's declaration."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    function: Function
    scope: Literal["api", "admin"]
    answer: Any
    query: Any
    body: Any
    errors: tuple[int, ...]

    @property
    def summary(self) -> str:
        """One sentence."""
        return (self.function.__doc__ or "").splitlines()[0]

    @property
    def tag(self) -> str:
        """What it is about."""
        return self.path.split("/")[2]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names in its path."""
        return tuple(part[1:-1] for part in self.path.split("/") if part.startswith("{"))

    @property
    def body_is_optional(self) -> bool:
        """Whether every field of the body has a default."""
        is_struct = isinstance(self.body, type) and issubclass(self.body, msgspec.Struct)
        return is_struct and not any(one.required for one in msgspec.structs.fields(self.body))


ROUTES: list[Route] = []
"""Every call, in the order of its declaration; filled when the modules below are imported."""


def route(
    method: Literal["GET", "POST", "DELETE"],
    path: str,
    *,
    answer: Any,
    scope: Literal["api", "admin"] = "api",
    query: Any = NoQuery,
    body: Any = None,
    errors: tuple[int, ...] = (),
) -> Callable[[Function], Function]:
    """Declare the function that answers a call; its docstring's first line is the summary.

    ``answer``, ``query`` and ``body`` are types; ``errors`` are statuses besides those that every
    call can have.
    """

    def declare(function: Function) -> Function:
        ROUTES.append(Route(method, path, function, scope, answer, query, body, errors))
        return function

    return declare
