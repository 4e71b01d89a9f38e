"""What a request says, read as its call declares it: path, query, body, key.

Only this module turns texts of a request into typed values. Each function raises `Problem` with the
field that is to blame.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from wsgateway.api import problems
from wsgateway.api.routes import Route

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})

NO_CALL = ("other", "other")
"""What is no call of the API."""

MAX_KEY = 128
"""Characters of an Idempotency-Key."""


def name_call(request: web.Request) -> tuple[str, str]:
    """A request's method and declared path, for metrics: never a word that its caller chose."""
    resource = request.match_info.route.resource
    if resource is None or request.method not in METHODS:
        return NO_CALL
    return request.method, resource.canonical


def read_path(request: web.Request, route: Route) -> dict[str, str]:
    """The values in a request's path."""
    values = dict(request.match_info)
    for name in route.parameters:
        if name != "connection_id" and not (
            values[name].isascii() and values[name].isdecimal() and len(values[name]) < 19
        ):
            raise problems.not_found(f"no such {name.removesuffix('_id')}", name)
    return values


def read_query(request: web.Request, route: Route) -> Any:
    """A request's query."""
    if not request.query_string:
        return route.query()
    values: dict[str, str] = {}
    for name, value in request.query.items():
        # msgspec would take the word null for no value at all.
        if name in values or value.lower() == "null":
            raise problems.invalid(name, "one value is expected")
        values[name] = value
    return convert(values, route.query, strict=False)


def convert(document: Any, kind: Any, *, strict: bool) -> Any:
    """A document as a declared type. Raises Problem with the field that is to blame."""
    try:
        return msgspec.convert(document, kind, strict=strict)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".")
        if "missing required field" in reason:
            raise problems.missing(reason.split("`")[1]) from None
        if "unknown field" in reason:
            raise problems.invalid(reason.split("`")[1], "no such parameter") from None
        raise problems.invalid(field or "body", reason) from None


def read_idempotency_key(request: web.Request) -> str | None:
    """The key that makes a repetition safe, if there is one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise problems.invalid("Idempotency-Key", f"1 to {MAX_KEY} characters")
    return key
