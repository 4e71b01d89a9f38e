"""What the gateway counts: plain integers.

Only this module says what is counted. It knows neither sockets nor loops; every room adds to the
counters it was given, in place, so that counting costs an integer addition.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class Tally(dict[str, int]):
    """Counts what every message adds to: a Counter's assignment costs three times as much."""

    __slots__ = ()

    def __missing__(self, label: str) -> int:
        return 0


@dataclass(slots=True)
class Metrics:
    """The counters of one instance since it started.

    The labels of a counter are words of this project (reasons, registered message types, our own
    close codes), never words of a client, so that no client can make a counter grow.
    """

    accepted: int = 0
    """TCP connections accepted."""
    opened: int = 0
    """Devices that were authenticated and told that they are connected."""
    refused: Counter[str] = field(default_factory=Counter)
    """Handshakes refused, by reason."""
    closed: Counter[str] = field(default_factory=Counter)
    """Device connections ended, by close code, 'aborted' codes being 1006."""
    aborted: Counter[str] = field(default_factory=Counter)
    """Connections cut without a close handshake, by reason."""
    received: Tally = field(default_factory=Tally)
    """Messages from devices, by registered type, else 'unknown' or 'invalid'."""
    received_bytes: int = 0
    """Bytes read from device sockets."""
    sent: int = 0
    """Messages written to devices."""
    sent_bytes: int = 0
    """Bytes written to device sockets."""
    errors: Counter[str] = field(default_factory=Counter)
    """Error messages to devices, by error code."""
    paused: int = 0
    """Times that reading from a device paused because its handlers were busy."""
    path_id_mismatches: int = 0
    """Devices whose path named another user than their token."""
    group_messages: int = 0
    """Messages accepted for a group."""
    delivered: int = 0
    """Group messages put on a member's queue."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Group messages that a member did not get, by reason."""
    fanout_slices: int = 0
    """Turns of the loop that a fan-out yielded after."""
    lookups: Counter[str] = field(default_factory=Counter)
    """Token look-ups, by where the answer came from: cache, database, failed."""
    forgotten_windows: int = 0
    """Message windows of devices that left, dropped because too many were remembered."""
    log_lines_dropped: int = 0
    """Log lines that were not written because the log was slower than the gateway."""
