"""Commands that call a running gateway over its HTTP API.

The address is `--url`, else `$WSGATEWAY_URL`, else http://127.0.0.1:8001; the key comes from
`--key-file`, else `$WSGATEWAY_API_KEY`, else `$WSGATEWAY_API_KEY_FILE`, never from the command line,
which others can see.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from wsgateway.cli import output
from wsgateway.errors import GatewayError, StartError, UsageError

DEFAULT_URL = "http://127.0.0.1:8001"

SECONDS = 40.0
"""How long an answer may take; a send waits 30 s at most."""

MAX_MESSAGE = 1 << 20
"""Bytes of a message that are read."""

PAGE = 500
"""Entries asked for at once."""


class CallFailed(GatewayError):
    """The gateway answered that it did not do it."""


def send(arguments: argparse.Namespace) -> None:
    """Send a message to a user, a device or everybody."""
    body: dict[str, Any] = {"type": arguments.type, "message": _message(arguments)}
    if arguments.key:
        body["id"] = arguments.key
    query = {"timeout": arguments.timeout, "wait": "none" if arguments.no_wait else None,
             "require": "online" if arguments.require_online else None}  # fmt: skip
    if arguments.user is not None:
        path = f"/api/users/{arguments.user}/messages"
    elif arguments.device is not None:
        path = f"/api/devices/{arguments.device}/messages"
    else:
        path = "/api/broadcast"
    delivery = _call(arguments, "POST", path, query, body)["delivery"]
    known = "" if delivery["complete"] else " (not all instances answered)"
    text = f"written to {delivery['written']} of {delivery['matched']} connections{known}"
    output.tell(arguments, delivery, delivery["written"], text)


def status(arguments: argparse.Namespace) -> None:
    """Show the gateway at one look."""
    stats = _call(arguments, "GET", "/api/stats")["data"]
    if arguments.json:
        print(json.dumps(stats, ensure_ascii=False))
        return
    print(f"wsgateway {stats['version']}, answered by {stats['instance']}")
    rates = ", ".join(f"{name} {rate:g}/s" for name, rate in stats["rates"].items())
    print(f"rates: {rates}")
    redis = ", ".join(f"{name} {state}" for name, state in stats["redis"].items())
    print(f"redis: {redis or 'off'}")
    slow = ", ".join(
        f"{name} {took['slow']} times" for name, took in stats["operations"].items() if took["slow"]
    )
    print(f"slower than 1 s since the start: {slow or 'nothing'}")
    rows = [{"instance": name, **counts} for name, counts in sorted(stats["instances"].items())]
    output.rows(arguments, ("instance", "connections", "users", "devices"), rows)


def online(arguments: argparse.Namespace) -> None:
    """List the connected users over all instances."""
    rows = list(_pages(arguments, "/api/users/online", "users", {}))
    columns = ("user_id", "connections", "instances", "connected_at", "last_activity")
    output.rows(arguments, columns, [{"id": row["user_id"], **row} for row in rows])


def connections(arguments: argparse.Namespace) -> None:
    """List the connections over all instances."""
    query = {"user_id": arguments.user, "device_id": arguments.device}
    columns = ("id", "user_id", "device_id", "instance", "address", "messages", "connected_at",
               "last_activity")  # fmt: skip
    rows = list(_pages(arguments, "/api/connections", "connections", query))
    output.rows(arguments, columns, rows)


def disconnect(arguments: argparse.Namespace) -> None:
    """Cut the connections of a user or a device, or one connection."""
    if arguments.connection is not None:
        path = f"/api/connections/{quote(arguments.connection, safe='')}"
        answer = _call(arguments, "DELETE", path)
    elif arguments.user is not None:
        path = f"/api/users/{arguments.user}/disconnect"
        answer = _call(arguments, "POST", path, body={"reason": arguments.reason})
    else:
        path = f"/api/devices/{arguments.device}/disconnect"
        answer = _call(arguments, "POST", path, body={"reason": arguments.reason})
    cut = answer["data"]
    known = "" if cut["complete"] else " (not all instances answered)"
    output.tell(arguments, cut, cut["cut"], f"{cut['cut']} connections cut{known}")


def queue_size(arguments: argparse.Namespace) -> None:
    """Show how many messages wait in the queue, and how many were rejected."""
    size = _call(arguments, "GET", "/api/queue")["data"]
    text = f"{size['waiting']} waiting, {size['rejected']} rejected"
    output.tell(arguments, size, size["waiting"], text)


def queue_add(arguments: argparse.Namespace) -> None:
    """Put a message for a user into the queue."""
    message = _message(arguments)
    if not isinstance(message, dict):
        message = {"type": arguments.type, "message": message}
    body = {"user_id": arguments.user, "message": message}
    answer = _call(arguments, "POST", "/api/queue", body=body)["data"]
    output.tell(arguments, answer, answer["waiting"], f"{answer['waiting']} waiting")


def queue_clear(arguments: argparse.Namespace) -> None:
    """Throw away the messages that wait in the queue."""
    answer = _call(arguments, "DELETE", "/api/queue")["data"]
    text = f"{answer['cleared']} messages thrown away"
    output.tell(arguments, answer, answer["cleared"], text)


def reload(arguments: argparse.Namespace) -> None:
    """Have the gateway read its configuration again, as SIGHUP does."""
    changes = _call(arguments, "POST", "/api/reload")["data"]
    text = f"applied: {', '.join(changes['applied']) or 'nothing changed'}"
    if changes["restart"]:
        text += f"\nneeds a restart: {', '.join(changes['restart'])}"
    output.tell(arguments, changes, len(changes["applied"]), text)


def _message(arguments: argparse.Namespace) -> Any:
    """The message of a command: JSON where it is JSON, else text."""
    if arguments.file:
        with Path(arguments.file).open("rb") as file:
            raw = file.read(MAX_MESSAGE + 1)
    elif arguments.message in (None, "-"):
        if sys.stdin is None or (arguments.message is None and sys.stdin.isatty()):
            raise UsageError("no message: give one, --file FILE, or pipe it in")
        raw = sys.stdin.buffer.read(MAX_MESSAGE + 1)
    else:
        raw = arguments.message.encode(errors="surrogateescape")
    if not raw:
        raise UsageError("the message is empty (an empty text is '\"\"')")
    if len(raw) > MAX_MESSAGE:
        raise UsageError(f"the message is longer than {MAX_MESSAGE} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise UsageError("the message is not UTF-8") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.rstrip("\n")


def _pages(
    arguments: argparse.Namespace, path: str, part: str, query: Mapping[str, object]
) -> Iterator[dict[str, Any]]:
    """Every entry of a list, page by page; at most ``--limit``."""
    left, cursor = arguments.limit, None
    while left > 0:
        page = {**query, "limit": min(left, PAGE), "cursor": cursor}
        data = _call(arguments, "GET", path, page)["data"]
        yield from data[part]
        left -= len(data[part])
        cursor = data["next"]
        if not data["complete"]:
            print("wsgateway: not all instances answered", file=sys.stderr)
        if cursor is None:
            return


def _call(
    arguments: argparse.Namespace,
    method: str,
    path: str,
    query: Mapping[str, object] | None = None,
    body: object = None,
) -> dict[str, Any]:
    """What the gateway answers.

    Raises:
        StartError: it cannot be reached.
        CallFailed: it refused.

    """
    base = (arguments.url or os.environ.get("WSGATEWAY_URL") or DEFAULT_URL).rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise UsageError(f"{base}: an address begins with http:// or https://")
    words = urlencode({key: value for key, value in (query or {}).items() if value is not None})
    request = urllib.request.Request(  # noqa: S310 - checked above
        f"{base}{path}" + (f"?{words}" if words else ""),
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "X-API-Key": _key(arguments)},
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise CallFailed(_reason(error)) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        why = getattr(reason, "strerror", None) or "no answer that can be understood"
        raise StartError(
            f"{base}: {why}: is wsgateway running there? (--url or $WSGATEWAY_URL)"
        ) from None


def find_key(arguments: argparse.Namespace) -> str:
    """The key of the HTTP API; empty if none is given. Raises UsageError."""
    place = arguments.key_file or (
        None if os.environ.get("WSGATEWAY_API_KEY") else os.environ.get("WSGATEWAY_API_KEY_FILE")
    )
    key = (
        Path(place).read_text("utf-8").strip() if place else os.environ.get("WSGATEWAY_API_KEY", "")
    )
    if not key.isascii() or not key.isprintable():
        raise UsageError("the key holds characters that no key has")
    return key


def _key(arguments: argparse.Namespace) -> str:
    key = find_key(arguments)
    if not key:
        raise UsageError(
            "no key: set $WSGATEWAY_API_KEY or $WSGATEWAY_API_KEY_FILE "
            "(wsgateway token create --user USER --scope admin)"
        )
    return key


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        document = json.load(error)
        field = f" ({document['field']})" if "field" in document else ""
        return f"{document['message']}{field} [{error.code} {document['code']}]"
    except (OSError, ValueError, KeyError, TypeError):
        return f"the gateway answered {error.code}"
