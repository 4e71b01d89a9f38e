"""What the documentation tells people to type works when it is typed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from websockets.exceptions import ConnectionClosedError

from tests.conftest import Accounts, RedisServer, running_gateway

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BACKENDS = ROOT / "docs" / "backends.md"
WITH_COMMANDS = [page for page in PAGES if "```sh\n" in page.read_text() and page != BACKENDS]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run_commands(page, tmp_path, environment)


def run_commands(page: Path, folder: Path, environment: dict[str, str]) -> str:
    """Type what a page shows in a shell; what was printed."""
    script = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-eu"], input=script, cwd=folder, env=environment | {"PATH": path},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_the_commands_for_backend_developers_reach_a_device(
    accounts: Accounts, redis_server: RedisServer, tmp_path: Path, environment: dict[str, str]
) -> None:
    key = await accounts.add_token(scope="admin")
    async with (
        running_gateway(accounts, redis__url=redis_server.url) as gateway,
        gateway.device() as device,
    ):
        said = await asyncio.to_thread(
            run_commands, BACKENDS, tmp_path,
            environment | {"WSGATEWAY_URL": gateway.api_url, "WSGATEWAY_API_KEY": key,
                           "REDIS_URL": redis_server.url},
        )  # fmt: skip
        got = []
        with contextlib.suppress(ConnectionClosedError):
            async for raw in device:
                message = orjson.loads(raw)
                got.append((message["type"], message["message"]))
        assert (device.close_code, device.close_reason) == (4003, "moved out")
    assert got == [
        ("notice", {"text": "dinner"}),
        ("volume", {"volume": 3}),
        ("system", "maintenance at noon"),
        ("a", 1),
        ("b", 2),
        ("system", "only once"),
    ]
    assert '"complete":true' in said
    assert "1 connections cut" in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for test in re.findall(r"`(tests/[\w./]+)`", page.read_text()):
        assert (ROOT / test).exists(), test


def test_what_is_made_from_the_code_is_up_to_date(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "scripts/write_docs.py", str(tmp_path)], cwd=ROOT, timeout=30
    )
    assert made.returncode == 0
    for name in ("openapi.yaml", "metrics.md"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "scripts/docs"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 800


def test_the_two_minutes_of_the_readme(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gateway = subprocess.Popen(
        ["scripts/serve", "--port", str(port)], cwd=ROOT, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert gateway.stdout is not None
    assert gateway.stderr is not None
    try:
        line = next(line for line in gateway.stdout if "-m websockets" in line)
        next(line for line in gateway.stderr if " ready " in line)
        _, _, _, url = line.split()
        device = subprocess.Popen(
            [sys.executable, "-m", "websockets", url.strip("'")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert device.stdin is not None
        assert device.stdout is not None
        device.stdin.write('{"type": "ping"}\n')
        device.stdin.flush()
        answer = next(line for line in device.stdout if "pong" in line)
        assert '"timestamp"' in answer
        device.communicate(timeout=10)
    finally:
        gateway.send_signal(signal.SIGTERM)
        gateway.communicate(timeout=15)
    assert gateway.returncode == 0
