"""Writes openapi.yaml and metrics.md from the code, into docs/ or the folder that is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from wsgateway.api import exposition, listener, openapi

DOCS = Path(__file__).parent.parent / "docs"

METRICS_PAGE = Path(__file__).with_name("metrics.md")
"""What stands before the table of all metrics."""


def api() -> str:
    """The description of the HTTP API as YAML."""
    assert listener.MODULES  # importing them declares the calls
    document = json.loads(json.dumps(openapi.document()))  # without what is shared, and so aliased
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def metrics() -> str:
    """The reference of every metric as Markdown."""
    lines = [
        METRICS_PAGE.read_text(),
        "| metric | type | labels | what it tells |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {kind} | {', '.join(labels)} | {meaning} |"
        for name, (kind, labels, meaning) in exposition.catalogue().items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    (folder / "openapi.yaml").write_text(api())
    (folder / "metrics.md").write_text(metrics())
