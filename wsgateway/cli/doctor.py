"""`wsgateway doctor`: what is wrong, and what to do.

Ends with 0 if nothing failed, with 1 if something did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import ssl
import sys
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from wsgateway import handlers, providers, store
from wsgateway.auth import MAX_TOKEN_LENGTH
from wsgateway.cli import masked, remote, settings
from wsgateway.config import Config
from wsgateway.doctor import backend, devices, host, process, redis, services, storage, visitor
from wsgateway.doctor.devices import Door, Sender
from wsgateway.doctor.finding import Finding, failed, skipped
from wsgateway.doctor.http import Place
from wsgateway.errors import EXIT_CRASH, EXIT_OK, StoreError, UsageError
from wsgateway.metrics import Metrics

STAY_SECONDS = 300.0
"""How long a visitor's tokens are good beside the silence: all checks take less."""


ADDRESS = re.compile(
    r"(?P<scheme>\w+)://(?P<host>[\w.-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?(?P<path>/[\w./-]*)?",
    re.ASCII,
)
"""No user and no query: they would be shown."""


def doctor(arguments: argparse.Namespace) -> int:
    """Check everything; the exit code."""
    logging.getLogger().addHandler(logging.NullHandler())  # findings say it better
    found = asyncio.run(_examine(arguments))
    if arguments.json:
        rows = [
            {key: masked(value) for key, value in finding._asdict().items()} for finding in found
        ]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        _print_table(found)
    return EXIT_CRASH if any(finding.status == "fail" for finding in found) else EXIT_OK


def _print_table(found: list[Finding]) -> None:
    words = {"fail": "FAIL", "warn": "WARN"}
    width = max(len(finding.name) for finding in found)
    for name, status, what, fix in found:
        advice = f" -> {fix}" if fix else ""
        line = masked(f"{what}{advice}")
        print(f"{words.get(status, status):<7}  {name:<{width}}  {line}")
    counts = Counter(finding.status for finding in found)
    print(", ".join(f"{counts[status]} {status}" for status in ("pass", "warn", "fail", "skipped")))


async def _examine(arguments: argparse.Namespace) -> list[Finding]:
    config = settings.load(arguments).config
    handlers.load(config.handlers.modules)
    asked = providers.build(config, Metrics())
    door, api = _door(arguments, config), _api(arguments, config)
    running = process.serving(config.server.port) if config.server.port else []
    uid = running[0].uid if running else None
    stored = await storage.check(config.database(), uid, arguments.timeout)
    groups: tuple[Coroutine[Any, Any, list[Finding]], ...] = (
        redis.check(config.redis, config.queue),
        services.check(config, asked, arguments.timeout),
        _live(arguments, config, door, api),
    )
    shared, outside, live = await asyncio.gather(*groups)
    here = [
        host.descriptors(config.limits, running),
        *host.libraries(config.runtime.loop),
        host.sqlite(store.SQLITE_VERSION),
    ]
    return [*here, *stored, *shared, *outside, *live]


async def _live(
    arguments: argparse.Namespace, config: Config, door: Door, api: Place | None
) -> list[Finding]:
    """Be a backend and a device of the running gateway, if there is one."""
    token, key = _read_token(arguments.token_file), remote.find_key(arguments)
    place = Place(re.sub(r"^ws(s?://[^/]*).*", r"http\1", door.url), door.timeout, door.context)
    found = [await backend.readiness(place)]
    try:
        async with contextlib.AsyncExitStack() as stack:
            if arguments.create:
                stay = visitor.staying(config.database(), STAY_SECONDS + (arguments.idle or 0))
                try:
                    made = await stack.enter_async_context(stay)
                except StoreError as error:
                    fix = "run this as the gateway's user, or give --token-file instead"
                    found.append(failed("account", str(error), fix))
                else:
                    token, key = made.token, key or made.key
            if api is None:
                found.append(skipped("http api", "api.enabled = false"))
            else:
                found += await backend.check(api, key)
            found.append(await devices.check_stranger(door))
            if token:
                senders = _senders(config, api, key)
                interval = config.keepalive.interval
                found += await devices.check(door, token, senders, arguments.idle, interval)
            else:
                found.append(skipped("device", "no token: --token-file FILE, or --create"))
    except StoreError as error:  # when the visitor was to leave
        fix = f"wsgateway user disable {visitor.NAME}-... (his tokens end in minutes by themselves)"
        found.append(failed("account", str(error), fix))
    return found


def _senders(config: Config, api: Place | None, key: str) -> list[Sender]:
    senders = [backend.sender(api, key)] if api is not None and key else []
    return [*senders, redis.sender(config.redis)] if config.redis.url else senders


def _door(arguments: argparse.Namespace, config: Config) -> Door:
    """Where devices connect. Raises UsageError."""
    given = arguments.device_url
    if given is None:
        if not config.server.port:
            raise UsageError("server.port is 0: name where devices connect with --device-url")
        scheme = "wss" if config.server.tls else "ws"
        url = f"{scheme}://{_reachable(config.server.host)}:{config.server.port}"
        return Door(f"{url}/ws/device/", arguments.timeout, _context(url, known=False))
    base, path = _address("--device-url", given, "ws", "wss")
    return Door(base + (path if len(path) > 1 else "/ws/device/"), arguments.timeout,
                _context(given, known=True))  # fmt: skip


def _address(option: str, given: str, *schemes: str) -> tuple[str, str]:
    """An address without its path, and the path. Raises UsageError, which does not repeat it."""
    found = ADDRESS.fullmatch(given)
    if found is None or found["scheme"] not in schemes or int(found["port"] or 0) > 65535:
        raise UsageError(f"{option}: write {schemes[0]}://HOST[:PORT][/PATH] or {schemes[1]}://...")
    path = found["path"] or ""
    return given.removesuffix(path), path


def _api(arguments: argparse.Namespace, config: Config) -> Place | None:
    """Where backends connect; None if the API is switched off. Raises UsageError."""
    given = arguments.url or os.environ.get("WSGATEWAY_URL")
    if given:
        base, path = _address("--url", given, "http", "https")
        return Place(base + path.rstrip("/"), arguments.timeout, _context(given, known=True))
    if not config.api.enabled:
        return None
    if not config.api.port:
        raise UsageError("api.port is 0: name where the HTTP API is with --url")
    scheme = "https" if config.api.tls else "http"
    url = f"{scheme}://{_reachable(config.api.host)}:{config.api.port}"
    return Place(url, arguments.timeout, _context(url, known=False))


def _reachable(address: str) -> str:
    """An address that leads to what listens on one."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address, address)  # noqa: S104
    return f"[{address}]" if ":" in address else address


def _context(url: str, *, known: bool) -> ssl.SSLContext | None:
    """TLS as a client uses it; a certificate is not for an address that only this host knows."""
    if not url.startswith(("wss:", "https:")):
        return None
    context = ssl.create_default_context()
    if not known:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _read_token(place: str | None) -> str:
    """A device's token from a file, or from standard input. Raises UsageError, OSError."""
    if place is None:
        return ""
    if place == "-":
        raw = sys.stdin.buffer.readline(MAX_TOKEN_LENGTH + 2) if sys.stdin else b""
    else:
        with Path(place).open("rb") as file:
            raw = file.readline(MAX_TOKEN_LENGTH + 2)
    token = raw.decode("ascii", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UsageError("--token-file: holds no token")
    return token
