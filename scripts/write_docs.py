"""Writes openapi.yaml and metrics.md from the code, into docs/ or the folder that is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from wsgateway.api import exposition, listener, openapi

DOCS = Path(__file__).parent.parent / "docs"


def api() -> str:
    """The description of the HTTP API as YAML."""
    assert listener.MODULES  # importing them declares the calls
    document = json.loads(json.dumps(openapi.document()))  # without what is shared, and so aliased
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def metrics() -> str:
    """The reference of every metric as Markdown."""
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` on the HTTP listener, in Prometheus' format; without a key on a loopback",
        "address only, with the label `instance_name`. What tells about Python comes on top. No label",
        "names a user, a device or anything that a client chose. Those that end in `_seconds` are",
        "histograms, but for the two that tell a time.",
        "",
        "| metric | what it counts |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in exposition.names().items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    (folder / "openapi.yaml").write_text(api())
    (folder / "metrics.md").write_text(metrics())
