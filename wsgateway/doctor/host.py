"""What the host gives the gateway: descriptors, libraries, the time.

Only this module knows the faults of libraries. It knows neither sockets nor the database.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
from collections.abc import Sequence
from typing import Final, NamedTuple

from wsgateway import config
from wsgateway.doctor.finding import Finding, failed, passed, skipped, warned
from wsgateway.doctor.process import Process

FEW_CONNECTIONS: Final = 1000
"""Room for fewer is rarely what somebody wants who set no limit: it is the default of shells."""

SKEW_SECONDS: Final = 5.0
"""Clocks that differ by more make tokens end at another time than was said."""


class Fault(NamedTuple):
    """What is wrong with a library before a version."""

    library: str
    fixed_in: str
    what: str


FAULTS: Final = (
    Fault("orjson", "3.11.6", "nested JSON ends the process (CVE-2024-27454, CVE-2025-67221)"),
    Fault("uvloop", "0.23.0", "a descriptor closed twice mixes up connections (uvloop#645, #649)"),
    Fault("websockets", "17.4", "its core was not tried with the fast path"),
    Fault("redis", "8.1.0", "its connections were not tried"),
    Fault("aiosqlite", "0.22.0", "its thread was not tried"),
    Fault("msgspec", "0.20.0", "it was not tried"),
    Fault("aiohttp", "3.12.0", "it was not tried"),
)
"""Found while this was built; a version that was not tried is below what the package requires."""


def descriptors(settings: config.Limits, running: Sequence[Process]) -> Finding:
    """Whether the connections that may come have a descriptor each."""
    name, reserve = "descriptors", settings.descriptor_reserve
    if running:
        limit = min(process.descriptors for process in running)
        whose = f"the gateway's limit of {limit}"
    else:  # which raises its soft limit to the hard one
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = config.MOST if limit == resource.RLIM_INFINITY else limit
        whose = f"this shell's limit of {limit} (no gateway was seen, and its unit has its own)"
    room = max(0, limit - reserve)
    fix = "LimitNOFILE=65536 in the unit (ulimit -Hn in a shell), then restart"
    if settings.connections > room or not room:
        what = f"limits.connections = {settings.connections}, but {room} fit under {whose}"
        return failed(name, what, f"{fix}; or lower limits.connections")
    if not settings.connections and room < FEW_CONNECTIONS:
        return warned(name, f"only {room} connections fit under {whose}", fix)
    return passed(name, f"{settings.connections or room} connections fit under {whose}")


def libraries(loop: str, faults: Sequence[Fault] = FAULTS) -> list[Finding]:
    """Whether the installed versions have faults that this project met."""
    found, versions = [], [f"Python {platform.python_version()}"]
    for library, fixed_in, what in faults:
        try:
            installed = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            if library == "uvloop" and loop == "uvloop":
                text = "uvloop is not installed: the gateway runs on asyncio, three times slower"
                found.append(warned(library, text, "pip install uvloop"))
            continue
        versions.append(f"{library} {installed}")
        if _numbers(installed) < _numbers(fixed_in):
            fix = f"pip install -U '{library}>={fixed_in}'"
            found.append(warned(library, f"{library} {installed}: {what}", fix))
    return found or [passed("libraries", ", ".join(versions))]


def sqlite(version: str) -> Finding:
    """Whether SQLite has the fault that damages a WAL when two connections checkpoint at once."""
    numbers = _numbers(version)
    mended = numbers >= (3, 51, 3) or any(
        numbers[:2] == line[:2] and numbers >= line for line in ((3, 50, 7), (3, 44, 6))
    )
    if mended or numbers < (3, 7):
        return passed("sqlite", f"SQLite {version}")
    return passed(
        "sqlite",
        f"SQLite {version}: its fault of two checkpoints at once (fixed in 3.51.3) does not happen "
        "as long as only wsgateway's commands write to the database",
    )


def clock(name: str, theirs: float | None, ours: float) -> Finding:
    """Compare two clocks, in seconds since 1970; a clock of whole seconds is up to one behind."""
    if theirs is None:
        return skipped(name, "it does not say its time")
    skew = theirs - ours
    if abs(skew) > SKEW_SECONDS:
        what = f"it is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this host's clock"
        fix = "let both hosts follow NTP (timedatectl set-ntp true): tokens end by the clock"
        return warned(name, what, fix)
    return passed(name, f"it agrees with this host's clock to {SKEW_SECONDS:g} s")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
