"""The HTTP API as a backend meets it, and what the gateway says of itself there.

Only this module knows which answers mean what. It knows neither devices nor Redis.
"""

from __future__ import annotations

import time
from typing import Any, Final

from wsgateway import __version__
from wsgateway.doctor import host, http
from wsgateway.doctor.devices import Sender
from wsgateway.doctor.finding import Finding, failed, passed, skipped, warned
from wsgateway.doctor.http import Answer, Place, Unanswered
from wsgateway.errors import one_line

ROUND: Final = "http to device"

NO_KEY: Final = (
    "no key: set $WSGATEWAY_API_KEY, or --key-file, or let --create make one for the time being"
)

REASONS: Final = {
    "draining": "wait until it has restarted",
    "database": "see the checks of the database",
    "redis": "see the checks of redis",
    "descriptors": "see the check of descriptors",
    "loop_lag": "lower the load, or add an instance",
}
"""What to do about each reason that /readyz names."""


async def check(api: Place, key: str) -> list[Finding]:
    """Ask the API for its health, and with a key for what it knows."""
    asked_at = time.time()
    try:
        alive = await http.ask(api, "/healthz")
    except Unanswered as error:
        fix = "start wsgateway there, or name its address with --url ($WSGATEWAY_URL)"
        return [failed("http api", f"{api.url}: {error}", fix)]
    if alive.document.get("status") != "ok":
        fix = "name the address of wsgateway's HTTP API with --url"
        return [failed("http api", f"{api.url} is not wsgateway ({alive.status})", fix)]
    found = [
        passed("http api", api.url),
        host.clock("clock of the gateway", alive.date, asked_at),
    ]
    if not key:
        return [*found, skipped("api key", NO_KEY)]
    try:
        answer = await http.ask(api, "/api/stats", key)
    except Unanswered as error:
        return [*found, failed("api key", f"{api.url}: {error}", "see the gateway's log")]
    if answer.status != 200:
        return [*found, _refused("api key", answer)]
    return [*found, *_stats(answer.document.get("data") or {})]


def _stats(stats: dict[str, Any]) -> list[Finding]:
    instance, version = one_line(str(stats.get("instance"))), one_line(str(stats.get("version")))
    found = [passed("api key", f"accepted by {instance}")]
    if version == __version__:
        found.append(passed("version", version))
    else:
        what = f"the gateway runs {version}, installed here is {__version__}"
        found.append(warned("version", what, "restart the gateway to run what is installed"))
    states = {one_line(str(role)): str(state) for role, state in stats.get("redis", {}).items()}
    down = [f"{role} {one_line(state)}" for role, state in states.items() if state != "up"]
    if down:
        fix = "see the checks of redis, and the gateway's log since when"
        found.append(failed("redis links", ", ".join(down), fix))
    elif states:
        found.append(passed("redis links", f"{', '.join(states)}: up"))
    return found


def _refused(name: str, answer: Answer) -> Finding:
    code = one_line(str(answer.document.get("code", "")))
    what = f"refused: {answer.status} {code}".strip()
    if answer.status == 401:
        fix = "wsgateway token list shows whether it ended; token create --scope admin makes one"
        return failed(name, what, fix)
    if answer.status == 403:
        return failed(name, what, "use a key of scope api or admin, not a device's token")
    return failed(name, what, "see the gateway's log")


async def readiness(device: Place) -> Finding:
    """What the device port says of itself."""
    name = "readiness"
    try:
        answer = await http.ask(device, "/readyz")
    except Unanswered as error:
        fix = "start wsgateway there (see the log why it ended), or name it with --device-url"
        return failed(name, f"{device.url}: {error}", fix)
    status = answer.document.get("status")
    reasons = [one_line(str(reason)) for reason in answer.document.get("reasons", ())]
    if status == "ok":
        return passed(name, f"{device.url} takes devices")
    fix = "; ".join(REASONS.get(reason, "see the gateway's log") for reason in reasons)
    if status == "degraded":
        return warned(name, f"degraded: {', '.join(reasons)}", fix)
    if status == "unavailable":
        return failed(name, f"takes no devices: {', '.join(reasons)}", fix)
    what = f"{device.url}/readyz is not wsgateway's ({answer.status})"
    return failed(name, what, "name where devices connect with --device-url")


def sender(api: Place, key: str) -> Sender:
    """Sends as a backend does: a call of the HTTP API."""

    async def send(user_id: int, message: dict[str, Any]) -> Finding | None:
        try:
            path = f"/api/users/{user_id}/messages?require=online"
            answer = await http.ask(api, path, key, message)
        except Unanswered as error:
            return failed(ROUND, f"{api.url}: {error}", "see the gateway's log")
        if answer.status == 404:
            fix = "let --url and --device-url name the same gateway, or connect both through Redis"
            return failed(ROUND, "the API does not know that this device is connected", fix)
        return None if answer.status == 200 else _refused(ROUND, answer)

    return Sender(ROUND, send, "see the gateway's log; is the device port another gateway's?")
