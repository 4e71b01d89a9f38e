"""The named failures of the project and the exit codes they end in.

Only this module says which failures exist. It knows neither sockets nor loops.

    GatewayError              one line for people: what is wrong, what to do
    ├── UsageError            a command was called wrongly                      exit 2
    ├── StartError            cannot start now, a later try may succeed         exit 3
    ├── ConfigError           the configuration cannot be used                  exit 78
    ├── StoreError            the token database did not answer
    │   ├── StoreMissing      there is no such file                             exit 78
    │   ├── StoreForeign      the file is not a database of this project        exit 78
    │   └── StoreBusy         locked by somebody else                           exit 3
    ├── NotFound              a user, device or token that does not exist       exit 1
    ├── Conflict              it exists already                                 exit 1
    └── Refused               a client may not connect (reason for log and metric)
    ServiceError              a handler's answer could not be had: told to the device
    InvalidMessage            a device's message breaks its type's schema: told to the device
"""

from __future__ import annotations

import re

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_RETRY = 3
EXIT_INTERRUPTED = 130
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: systemd must not restart a unit that ends with it."""


_TOKEN = re.compile(r"wsg_[\w-]{20,}|[0-9a-f]{40,}")
"""Looks like a token of ours or of another backend."""


def without_tokens(text: str) -> str:
    """Text that shows no token, wherever one was typed by mistake."""
    return _TOKEN.sub("***", text)


def one_line(text: str) -> str:
    """Text that cannot forge another line or command a terminal (CWE-117)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class GatewayError(Exception):
    """A failure that a person is told about in one line."""

    exit_code = EXIT_CRASH

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class UsageError(GatewayError):
    """A command was called with words that do not fit together."""

    exit_code = EXIT_USAGE


class StartError(GatewayError):
    """The gateway cannot start now (port busy, database locked); trying again may help."""

    exit_code = EXIT_RETRY


class ConfigError(GatewayError):
    """The configuration cannot be used; trying again does not help."""

    exit_code = EXIT_CONFIG


class StoreError(GatewayError):
    """The token database did not answer."""


class StoreMissing(StoreError):
    """There is no database file at the configured path."""

    exit_code = EXIT_CONFIG


class StoreForeign(StoreError):
    """The file is no database of this project, or of a version this one cannot read."""

    exit_code = EXIT_CONFIG


class StoreBusy(StoreError):
    """Another process holds the database locked."""

    exit_code = EXIT_RETRY


class NotFound(GatewayError):
    """A user, device or token that does not exist."""


class Conflict(GatewayError):
    """What was asked for contradicts what is there already."""


class Refused(GatewayError):
    """A client may not connect.

    ``reason`` is a word for the log and the metric, never for the client; ``retry_after`` in
    seconds says that the refusal is the gateway's own trouble and not the client's fault.
    """

    def __init__(self, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class ServiceError(Exception):
    """A handler's answer could not be had. The text goes to the device as it is."""


class InvalidMessage(Exception):
    """A message breaks the schema of its type.

    ``errors`` maps a field's name to the reasons, as the device is told.
    """

    def __init__(self, errors: dict[str, list[str]]) -> None:
        super().__init__(", ".join(errors))
        self.errors = errors
