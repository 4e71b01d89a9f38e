"""The description of the HTTP API (OpenAPI 3.1), made from the calls' declarations."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus
from typing import Any

import msgspec

from wsgateway import __version__
from wsgateway.api import answers
from wsgateway.api.routes import ROUTES, NoQuery, Route

ALWAYS = (401, 403, 503)
"""Statuses that every call can have."""

WITH_BODY = (400, 408, 411, 413, 415, 422)

ABOUT = """Send to devices, look who is online, cut connections.

Keys are tokens of scope `api` or `admin`, or `[[api.keys]]` of the configuration."""

_REF = "#/components/schemas/{name}"


@lru_cache
def document() -> dict[str, Any]:
    """The whole description; the calls' modules must have been imported."""
    kinds = [answers.Failed]
    for route in ROUTES:
        kinds += [kind for kind in (route.body, route.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_kind = dict(zip(map(repr, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "wsgateway", "version": __version__, "description": ABOUT},
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    statuses = {*ALWAYS, *route.errors}
    if route.body is not None:
        statuses |= set(WITH_BODY)
    if route.query is not NoQuery:
        statuses.add(422)
    if route.parameters:
        statuses.add(404)
    operation: dict[str, Any] = {
        "operationId": route.function.__name__,
        "summary": route.summary,
        "tags": [route.tag],
        "description": f"Needs a key of scope {route.scope}.",
        "parameters": [*map(_path_parameter, route.parameters), *_query_parameters(route)],
        "responses": {
            "200": _response("Done.", _success(route, schemas[repr(route.answer)])),
            **{
                str(status): _response(HTTPStatus(status).phrase, schemas[repr(answers.Failed)])
                for status in sorted(statuses)
            },
        },
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.body_is_optional,
            "content": {"application/json": {"schema": schemas[repr(route.body)]}},
        }
    return operation


def _success(route: Route, schema: dict[str, Any]) -> dict[str, Any]:
    if route.answer is answers.Sent:
        return schema
    return {
        "type": "object",
        "required": ["status", "message", "data"],
        "properties": {
            "status": {"const": "success"},
            "message": {"type": "string"},
            "data": schema,
        },
    }


def _response(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _path_parameter(name: str) -> dict[str, Any]:
    kind = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
    if name == "connection_id":
        kind = {"type": "string", "minLength": 1, "maxLength": 64}
    return {"name": name, "in": "path", "required": True, "schema": kind}


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    if route.query is NoQuery:
        return []
    schema = msgspec.json.schema(route.query)["$defs"][route.query.__name__]
    found = []
    for name, kind in schema["properties"].items():
        options = [one for one in kind.get("anyOf", [kind]) if one.get("type") != "null"]
        text = kind.get("description") or options[0].get("description", "")
        rest = {key: value for key, value in options[0].items() if key != "description"}
        if kind.get("default") is not None:
            rest["default"] = kind["default"]
        found.append({"name": name, "in": "query", "description": text, "schema": rest})
    return found
