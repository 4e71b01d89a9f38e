"""What the HTTP listener answers without a key: health, the API's description, the dashboard, metrics.

Only this module knows these paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import orjson

from wsgateway.api import exposition, openapi
from wsgateway.api.context import Api

METRICS = {"Content-Type": exposition.CONTENT_TYPE, "Cache-Control": "no-store"}
JSON = {"Content-Type": "application/json", "Cache-Control": "no-store"}

POLICY = "default-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
"""The page loads nothing from elsewhere and cannot be framed (CSP level 3)."""

Made = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Document:
    """Something to be fetched: status, headers and body; ``keyed`` if only with a key."""

    make: Callable[[], Made]
    keyed: bool = False


def documents(api: Api, *, metrics_keyed: bool) -> dict[str, Document]:
    """What is to be fetched, by path."""
    return {
        "/healthz": Document(lambda: (200, JSON, b'{"status":"ok"}')),
        "/readyz": Document(lambda: _ready(api)),
        "/api/openapi.json": Document(lambda: (200, JSON, orjson.dumps(openapi.document()))),
        "/": _page("dashboard.html", "text/html"),
        "/static/dashboard.js": _page("dashboard.js", "text/javascript"),
        "/static/dashboard.css": _page("dashboard.css", "text/css"),
        "/metrics": Document(lambda: (200, METRICS, exposition.text(api)), metrics_keyed),
    }


def _page(name: str, kind: str) -> Document:
    body = (resources.files("wsgateway.api") / "static" / name).read_bytes()
    headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Security-Policy": POLICY}
    return Document(lambda: (200, headers, body))


def _ready(api: Api) -> Made:
    readiness = api.readiness()
    return 503 if readiness["status"] == "unavailable" else 200, JSON, orjson.dumps(readiness)
