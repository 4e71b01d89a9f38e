"""What the gateway counts: plain integers.

Only this module says what is counted. It knows neither sockets nor loops; every room adds to the
counters it was given, in place, so that counting costs an integer addition.
"""

from __future__ import annotations

from collections import Counter, deque
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
    """Handshakes refused, by reason; those of TLS and the PROXY protocol too, on both listeners."""
    gate_delayed: int = 0
    """Handshakes that had to wait because the loop was behind."""
    loop_lag: float = 0.0
    """Seconds by which the loop's last tick came late."""
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
    compression_agreed: int = 0
    """Devices that were let in with compression agreed on."""
    compression_input_bytes: int = 0
    """Bytes of messages to devices before they were compressed; a group's message counts once for
    each window size."""
    compression_output_bytes: int = 0
    """Bytes of the same messages afterwards."""
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
    tls_certificate_expires: float = 0.0
    """When the certificate expires, in seconds since 1970; 0 without TLS."""
    log_lines_dropped: int = 0
    """Log lines that were not written because the log was slower than the gateway."""

    provider_requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests to outside services, by provider and outcome: ok, what failed, or why none was made
    (paused, busy)."""
    provider_pauses: Counter[str] = field(default_factory=Counter)
    """Times that a service which failed began to be left alone, by provider."""
    weather_answers: Counter[str] = field(default_factory=Counter)
    """Weather asked for, by source: cache, service, or shared with a request under way."""
    chat_tokens: Counter[str] = field(default_factory=Counter)
    """Tokens that the chat service counted, by kind: prompt, completion."""
    chat_cost_micros: int = 0
    """What these tokens cost, in millionths of the currency of the configured prices."""

    redis_states: dict[str, str] = field(default_factory=dict)
    """How each connection to Redis stands, by what it is for."""
    redis_overflows: int = 0
    """Submissions to Redis refused because too many bytes were waiting."""
    mirror_published: Counter[str] = field(default_factory=Counter)
    """Group messages for other instances, by fate: taken, not_sent, refused, unknown."""
    mirror_received: int = 0
    """Group messages that came through Redis."""
    mirror_rejected: Counter[str] = field(default_factory=Counter)
    """What came through Redis and could not be passed on, by reason."""
    mirror_duplicates: int = 0
    """Group messages dropped because they came before, or too late to keep the order."""
    mirror_interruptions: int = 0
    """Times that the subscriber's connection was lost."""
    mirror_gaps: int = 0
    """Times that messages of another instance were missing."""
    mirror_lost: int = 0
    """Messages of other instances that never arrived."""
    mirror_lag: float = 0.0
    """Seconds that the last probe took through Redis and back."""
    unconfirmed: int = 0
    """Devices let in before Redis confirmed their groups."""
    receipts_incomplete: int = 0
    """Sends for which an instance did not answer in time, or Redis was away."""
    queue_items: Counter[str] = field(default_factory=Counter)
    """Items taken from the queue, by fate: sent, rejected, put_back."""
    api_requests: Counter[int] = field(default_factory=Counter)
    """Requests to the HTTP API, by status."""
    api_busy: int = 0
    """Requests to the HTTP API refused because too many were under way."""

    reloads: Counter[str] = field(default_factory=Counter)
    """Reloads of the configuration, by result: applied, refused."""
    reloaded_at: float = 0.0
    """When the last reload was applied, in seconds since 1970; 0 before the first."""


class Rates:
    """How many a second lately, from two looks at the counters some seconds apart."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=3)

    def sample(self, now: float) -> None:
        """Look at the counters; to be called every few seconds."""
        metrics = self._metrics
        self._samples.append(
            (
                now,
                {
                    "messages_in": sum(metrics.received.values()),
                    "messages_out": metrics.sent,
                    "connects": metrics.opened,
                },
            )
        )

    def per_second(self) -> dict[str, float]:
        """``{"messages_in", "messages_out", "connects"}`` per second, of the last 5 to 10 s."""
        if not self._samples:
            return {}
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        seconds = max(ended - began, 1e-9)
        return {name: round((last[name] - first[name]) / seconds, 1) for name in last}
