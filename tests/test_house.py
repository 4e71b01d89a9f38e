"""The rules of the house: who imports whom, how long rooms are, what they may be called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wsgateway"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "background", "signals", "proxy", "timings"},
    {"config", "metrics", "wire", "hub", "limits", "ledger", "subscriptions"},
    {"deflate"},
    {
        "logs",
        "systemd",
        "dump",
        "store",
        "providers",
        "fanout",
        "handshake",
        "envelope",
        "gate",
        "tls",
    },
    {"handlers", "gateway", "auth", "link", "sockets"},
    {"session", "reload", "accounts", "roster", "cluster", "mirror"},
    {"connection", "control", "sends", "presence", "health"},
    {"admission", "ingest", "drain"},
    {"listener", "federation", "api"},
    {"server", "demo", "doctor"},
    {"cli"},
]
"""From the lowest; a room imports from those below it, and a package's parts from each other."""

THIRD_PARTY = {
    "websockets": {"connection", "deflate", "handshake", "admission", "listener", "doctor"},
    "aiosqlite": {"store"},
    "sqlite3": {"store"},
    "uvloop": {"server"},
    "redis": {"link"},
    "aiohttp": {"api", "providers"},
    "yarl": {"providers"},
    "cryptography": {"providers"},
    "msgspec": {"config", "handlers", "demo", "server", "api", "providers"},
    "orjson": {"wire", "handshake", "logs", "envelope", "cluster", "presence", "ingest", "api"},
}
"""Where a library may be imported. Handlers use msgspec as a user's own types do; the doctor is a
device, and so a WebSocket client."""


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "wsgateway":
                yield from (f"wsgateway.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_and_libraries_stay_in_their_room(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    level = next((n for n, layer in enumerate(LAYERS) if here in layer), None)
    assert level is not None, f"{here} has no layer: add it to LAYERS"
    below = set().union(*LAYERS[:level], {here, "__version__"})
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "wsgateway":
            assert rest[0] in below, f"{here} imports {rest[0]}, which is not below it"
        elif top in THIRD_PARTY:
            assert here in THIRD_PARTY[top], f"{here} imports {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_are_small_and_named_after_what_they_know(path: Path) -> None:
    for word in ("util", "helper", "common", "misc", "base", "manager"):
        assert word not in path.stem
    source = path.read_text()
    tree = ast.parse(source)
    text = ast.get_docstring(tree)
    assert text, "a module says what it is"
    if source.count("\n") > 400:
        assert "Longer than 400 lines" in text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            reason = "Longer than 50 lines" in (ast.get_docstring(node) or "")
            assert length <= 50 or reason, f"{path}: {node.name} has {length} lines"
