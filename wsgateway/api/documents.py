"""What the HTTP listener answers without a key: health, the API's description, metrics.

Only this module knows these paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import orjson

from wsgateway.api import exposition, openapi
from wsgateway.api.context import Api

METRICS = {"Content-Type": exposition.CONTENT_TYPE, "Cache-Control": "no-store"}
JSON = {"Content-Type": "application/json", "Cache-Control": "no-store"}

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
        "/metrics": Document(lambda: (200, METRICS, exposition.text(api)), metrics_keyed),
    }


def _ready(api: Api) -> Made:
    reasons = api.not_ready()
    status = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
    return 503 if reasons else 200, JSON, orjson.dumps(status)
