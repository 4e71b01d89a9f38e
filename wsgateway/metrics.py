"""What the gateway counts and measures: plain integers.

Only this module says what is counted. It knows neither sockets nor loops; every room adds to the
counters it was given, in place, so that counting costs an integer addition.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from wsgateway.timings import BRIEF, LASTING, LONG, Durations, Histogram


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
    handshake_seconds: Histogram = field(default_factory=lambda: Histogram(BRIEF))
    """From the accepted connection to the device that is told that it is connected."""
    gate_delayed: int = 0
    """Handshakes that had to wait because the loop was behind."""
    gate_seconds: Histogram = field(default_factory=lambda: Histogram(BRIEF))
    """How long they waited."""
    loop_lag_seconds: Histogram = field(default_factory=lambda: Histogram(BRIEF))
    """How late the loop came to its ticks, of which there are ten a second."""
    connection_seconds: Histogram = field(default_factory=lambda: Histogram(LASTING))
    """How long devices were connected, once they are gone."""
    closed: Counter[str] = field(default_factory=Counter)
    """Device connections ended, by close code, 'aborted' codes being 1006."""
    aborted: Counter[str] = field(default_factory=Counter)
    """Connections cut without a close handshake, by reason."""
    received: Tally = field(default_factory=Tally)
    """Messages from devices, by registered type, else 'unknown'; what is no message, sent too fast or
    too long is told by the errors alone."""
    received_bytes: int = 0
    """Bytes read from device sockets."""
    sent: Tally = field(default_factory=Tally)
    """Messages to devices: the answer to a registered type by that type's name, 'error',
    'connection_status', 'group', or 'more' for what a handler sends besides its answer."""
    handler_seconds: Durations = field(default_factory=lambda: Durations("handler", LONG))
    """How long handlers took that wait for something, by message type; the others answer at once."""
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
    lookup_seconds: Durations = field(default_factory=lambda: Durations("look-up", BRIEF))
    """How long tokens waited for their look-up, by where it was made; the cache answers at once."""
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
    provider_seconds: Durations = field(default_factory=lambda: Durations("provider", LONG))
    """How long requests to outside services took, by provider, failed ones too."""
    provider_pauses: Counter[str] = field(default_factory=Counter)
    """Times that a service which failed began to be left alone, by provider."""
    weather_answers: Counter[str] = field(default_factory=Counter)
    """Weather asked for, by source: cache, service, or shared with a request under way."""
    chat_tokens: Counter[str] = field(default_factory=Counter)
    """Tokens that the chat service counted, by kind: prompt, completion."""
    chat_cost_micros: int = 0
    """What these tokens cost, in the currency of the configured prices; counted in millionths."""

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
    mirror_twins: int = 0
    """Probes of another instance with this one's name: receipts and presence of both are wrong."""
    mirror_gaps: int = 0
    """Times that messages of another instance were missing."""
    mirror_lost: int = 0
    """Messages of other instances that never arrived."""
    mirror_lag_seconds: Histogram = field(default_factory=lambda: Histogram(BRIEF))
    """How long probes, of which there is one a second, took through Redis and back."""
    unconfirmed: int = 0
    """Devices let in before Redis confirmed their groups."""
    receipt_seconds: Histogram = field(default_factory=lambda: Histogram(BRIEF))
    """How long senders waited for other instances to answer."""
    receipts_incomplete: int = 0
    """Sends for which an instance did not answer in time, or Redis was away."""
    queue_items: Counter[str] = field(default_factory=Counter)
    """Items taken from the queue, by fate: sent, rejected, put_back."""
    queue_waiting: float = 0.0
    """Items that wait in the queue, as the instance that takes them last saw; 0 on the others."""
    queue_rejected: float = 0.0
    """Items among the rejected ones, likewise."""
    api_requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """Requests to the HTTP API, by method, route and status."""
    api_seconds: Durations = field(default_factory=lambda: Durations("api", BRIEF))
    """How long calls took, from the read head to the answer, by call."""
    api_busy: int = 0
    """Requests to the HTTP API refused because too many were under way."""

    reloads: Counter[str] = field(default_factory=Counter)
    """Reloads of the configuration, by result: applied, refused."""
    reloaded_at: float = 0.0
    """When the last reload was applied, in seconds since 1970; 0 before the first."""

    def operations(self) -> dict[str, dict[str, Any]]:
        """What was measured, as `Durations.summary` tells it."""
        kinds = (self.handler_seconds, self.lookup_seconds, self.provider_seconds, self.api_seconds)
        return {name: told for kind in kinds for name, told in kind.summary().items()}


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
                    "messages_out": sum(metrics.sent.values()),
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
