"""Alerts and dashboard ask for metrics that exist, and each alert has its paragraph."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from wsgateway.api import exposition
from wsgateway.metrics import Metrics
from wsgateway.timings import Durations, Histogram

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "scripts" / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "wsgateway.rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "scripts" / "deploy" / "grafana" / "wsgateway.json").read_text())
PAGE = (ROOT / "docs" / "operations.md").read_text()

OF_THE_SCRAPE = {"job", "instance", "instance_name"}


def labels() -> dict[str, set[str]]:
    """Every series that a scrape has, with its own labels."""
    found: dict[str, set[str]] = {"up": set(), **{name: set() for name in exposition.names()}}
    for field in exposition.descriptions():
        value, own = getattr(Metrics(), field), set(exposition.LABELS.get(field, "").split())
        name = exposition._name(field, value)
        found[name] = own
        if isinstance(value, Histogram | Durations):
            del found[name]
            found |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
    found["wsgateway_redis_states"] = {"connection", "state"}
    found["wsgateway_build_info"] = {"version", "python"}
    return found


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


EXPRESSIONS = [
    *((rule["alert"], rule["expr"]) for rule in RULES),
    *((panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]),
]


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_what_is_asked_for_exists(where: str, expression: str) -> None:
    known = labels()
    used = re.findall(r"\b((?:wsgateway|process)_\w+|up)\b(?:\{(.*?)\})?", expression)
    assert used, where
    grouped = re.findall(r"by \((.*?)\)", expression)
    available = set(OF_THE_SCRAPE)
    for name, selector in used:
        assert name in known, f"{where}: no metric {name}"
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert wanted <= known[name] | OF_THE_SCRAPE, f"{where}: {name} has no {wanted}"
        available |= known[name]
    for names in grouped:
        assert set(re.split(r",\s*", names)) <= available, where


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_says_what_to_do_and_has_its_paragraph(rule: dict[str, Any]) -> None:
    name = rule["alert"]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    assert f"\n### {name}\n" in PAGE


def test_every_paragraph_has_its_alert() -> None:
    assert re.findall(r"\n### (Wsgateway\w+)\n", PAGE) == [rule["alert"] for rule in RULES]


def test_the_dashboard_fits_a_screen_and_no_panels_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.monitoring
@pytest.mark.parametrize("command", [("check", "rules", "wsgateway.rules.yml"),
                                     ("test", "rules", "wsgateway.test.yml")], ids=" ".join)  # fmt: skip
def test_prometheus_reads_the_alerts(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout
