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

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "scripts" / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "wsgateway.rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "scripts" / "deploy" / "grafana" / "wsgateway.json").read_text())
SOURCES = "\n".join(path.read_text() for path in (ROOT / "wsgateway").rglob("*.py"))
ZEROS = {word for labels in exposition.ZEROS.values() for word in labels.split()}
PAGE = (ROOT / "docs" / "operations.md").read_text()

OF_THE_SCRAPE = {"job", "instance", "instance_name"}


def labels() -> dict[str, set[str]]:
    """Every series that a scrape has, with its own labels."""
    found: dict[str, set[str]] = {"up": set()}
    for name, (kind, own, _) in exposition.catalogue().items():
        if kind == "histogram":
            found |= {
                f"{name}_bucket": {*own, "le"},
                f"{name}_sum": {*own},
                f"{name}_count": {*own},
            }
        else:
            found[name] = {*own}
    return found


def chosen(expression: str) -> Iterator[tuple[str, str]]:
    """The metrics of an expression with each word that one of their own labels is to be."""
    for name, selector in re.findall(r"\b(wsgateway_\w+)\{(.*?)\}", expression):
        for label, words in re.findall(r'(\w+)(?:=~|!~|!=|=)"(.*?)"', selector):
            if label not in OF_THE_SCRAPE:
                yield from ((name, word) for word in words.split("|"))


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


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_what_a_label_is_to_be_is_a_word_of_the_code(where: str, expression: str) -> None:
    for name, word in chosen(expression):
        known = f'"{word}"' in SOURCES or word in ZEROS or word in ("4..", "5..")  # statuses
        assert known, f"{where}: {name} is never of {word}"


@pytest.mark.parametrize("word", sorted(ZEROS))
def test_what_is_told_as_zero_is_a_word_of_the_code(word: str) -> None:
    assert f'"{word}"' in SOURCES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_the_first_of_what_an_alert_waits_for_is_growth(rule: dict[str, Any]) -> None:
    """A series that begins with 1 has not grown: each is there before."""
    for name, word in chosen(rule["expr"]):
        if re.search(r"(?:increase|rate)\(" + name, rule["expr"]) and "!~" not in rule["expr"]:
            field = name.removeprefix("wsgateway_").removesuffix("_total")
            assert word in exposition.ZEROS[field].split()


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


@pytest.mark.monitoring
def test_prometheus_reads_what_the_dashboard_asks_for(tmp_path: Path) -> None:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(asked)
    ]
    made = tmp_path / "panels.yml"
    made.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(made)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
