"""The HTTP API is what its description says: routes, and answers to whatever the schema allows."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from aiohttp import ClientSession
from openapi_spec_validator import validate

from tests.conftest import Instance, Process, RedisServer
from wsgateway.api import listener, openapi
from wsgateway.api.routes import ROUTES

pytestmark = pytest.mark.long

DOCUMENT = Path(__file__).parent.parent / "docs" / "openapi.yaml"

UNFIT = "ignored_auth,not_a_server_error,unsupported_method,positive_data_acceptance"
"""Checks that do not fit: a key may come in either of two headers, 503 and 504 are honest answers
(500 is no status of the schema, so it is found all the same), and only a page's own cursor is
accepted for the next one."""


def test_the_document_is_openapi_3_1_and_names_every_route() -> None:
    assert listener.MODULES
    document = yaml.safe_load(DOCUMENT.read_text())
    validate(document)
    assert document["openapi"].startswith("3.1")
    declared = {(route.path, route.method.lower()) for route in ROUTES}
    described = {(path, verb) for path, verbs in document["paths"].items() for verb in verbs}
    assert described == declared


async def test_a_running_gateway_serves_its_description_without_a_key(gateway: Instance) -> None:
    async with (
        ClientSession() as session,
        session.get(f"{gateway.api_url}/api/openapi.json") as answer,
    ):
        assert answer.status == 200
        assert await answer.json() == yaml.safe_load(DOCUMENT.read_text())
    assert openapi.document()["openapi"] == "3.1.0"


@pytest.mark.timeout(120)
def test_whatever_the_schema_allows_is_answered_as_it_says(
    cli: Callable[..., subprocess.CompletedProcess[str]],
    redis_server: RedisServer,
    serve: Callable[..., Process],
    tmp_path: Path,
) -> None:
    database = tmp_path / "wsgateway.db"
    key = "a-key-of-the-configuration"
    config = tmp_path / "config.toml"
    config.write_text(
        f'[auth]\ndatabase = "{database}"\n'
        f'[redis]\nurl = "{redis_server.url}"\n'
        f'[[api.keys]]\nname = "test"\nscope = "admin"\n'
        f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
    )
    for words in (("db", "init"), ("user", "add", "alice"), ("device", "add", "d", "--user", "1")):
        assert cli(*words, "--config", str(config)).returncode == 0
    gateway = serve("--config", str(config), "--host", "127.0.0.1")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("schemathesis")), "run",
         f"http://127.0.0.1:{gateway.api_port}/api/openapi.json", "-H", f"X-API-Key: {key}",
         "--checks", "all", "--exclude-checks", UNFIT, "--phases", "coverage,fuzzing",
         "--max-examples", "10", "--no-color", "--request-timeout", "20",
         "--generation-deterministic"],
        cwd=tmp_path, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Traceback" not in gateway.log.read_text()
