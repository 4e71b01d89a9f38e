"""The counters as Prometheus reads them.

Only this module knows prometheus-client and the metrics' names. What each one means is written once,
at its declaration in `metrics`. Counting stays an integer addition: the values are read when they
are asked for.
"""

from __future__ import annotations

import ast
import inspect
import platform
import resource
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, PlatformCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from wsgateway import __version__
from wsgateway.api.context import Api
from wsgateway.health import descriptors
from wsgateway.metrics import Metrics
from wsgateway.timings import Durations, Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST

LABELS = {
    "refused": "reason",
    "closed": "code",
    "aborted": "reason",
    "received": "type",
    "sent": "type",
    "handler_seconds": "type",
    "lookup_seconds": "source",
    "provider_seconds": "provider",
    "api_seconds": "call",
    "errors": "code",
    "dropped": "reason",
    "lookups": "source",
    "provider_requests": "provider outcome",
    "provider_pauses": "provider",
    "weather_answers": "source",
    "chat_tokens": "kind",
    "redis_states": "connection state",
    "mirror_published": "fate",
    "mirror_rejected": "reason",
    "queue_items": "fate",
    "api_requests": "method route status",
    "reloads": "result",
}
"""The label of each field that has one, or its labels in the order of its keys' parts."""

NAMES = {
    "chat_cost_micros": "chat_cost_total",
    "reloaded_at": "reloaded_timestamp_seconds",
    "tls_certificate_expires": "tls_certificate_expires_timestamp_seconds",
}
"""Names that do not follow from the field's."""

MICROS = 1e-6
"""What a counter is multiplied with whose field is in millionths."""

ZEROS = {
    "refused": "address_full database descriptors draining expired full handshake_timeout handshakes "
    "lookups missing origin overload rate unknown user_full",
    "aborted": "close_timeout slow stalled",
    "dropped": "fanout_full member_gone",
    "lookups": "cache database failed",
    "mirror_published": "taken not_sent refused unknown",
    "queue_items": "sent rejected put_back",
    "reloads": "applied refused",
}
"""Labels that are told before anything was counted: to Prometheus the first value of a series is no
growth, and an alert would miss the first of what it waits for."""

SUFFIXES = {"counter": "_total", "info": "_info"}
"""What a metric's name has that its family's has not, by type."""


class Entry(NamedTuple):
    """What is known of a metric before it has a value."""

    kind: str
    labels: tuple[str, ...]
    meaning: str


def text(api: Api) -> bytes:
    """All metrics of one instance, in Prometheus' text format.

    Written here, as the library's `generate_latest` takes 8 us for each sample, of which there are
    hundreds: it looks whether each name is one.
    """
    lines: list[str] = []
    for collector in (_Collector(api), PlatformCollector(registry=None)):
        for metric in collector.collect():
            name = metric.name + SUFFIXES.get(metric.type, "")
            kind = "gauge" if metric.type == "info" else metric.type
            lines += (f"# HELP {name} {metric.documentation}\n", f"# TYPE {name} {kind}\n")
            lines += map(_line, metric.samples)
    return "".join(lines).encode()


@lru_cache
def descriptions() -> dict[str, str]:
    """What each field of `Metrics` counts, as its declaration says."""
    body = ast.parse(inspect.getsource(Metrics)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, string in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(string, ast.Expr)
            assert isinstance(string.value, ast.Constant)
            found[field.target.id] = " ".join(str(string.value.value).split())
    return found


def catalogue() -> dict[str, Entry]:
    """Every metric but those of Python, by name."""
    found = {name: Entry("gauge", (), meaning) for name, meaning in GAUGES.items()}
    found["wsgateway_build_info"] = Entry(
        "info", ("version", "python"), GAUGES["wsgateway_build_info"]
    )
    metrics = Metrics()
    for field, meaning in descriptions().items():
        value, labels = getattr(metrics, field), tuple(LABELS.get(field, "").split())
        found[_name(field, value)] = Entry(_kind(value), labels, meaning)
    for name, meaning in PROCESS.items():
        found[name] = Entry("counter" if name.endswith("_total") else "gauge", (), meaning)
    return found


GAUGES = {
    "wsgateway_connections": "Devices connected.",
    "wsgateway_users": "Users with a device connected.",
    "wsgateway_devices": "Devices connected that have an id.",
    "wsgateway_instances": "Instances alive, this one too.",
    "wsgateway_build_info": "Version and instance, always 1.",
    "wsgateway_ready": "1 while /readyz answers 200, else 0.",
    "wsgateway_degraded": "1 while the mirror is deaf and redis.required is off, else 0.",
}


class _Collector(Collector):
    def __init__(self, api: Api) -> None:
        self._api = api

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics():
            for sample in metric.samples:
                sample.labels["instance_name"] = self._api.cluster.name
            yield metric

    def _metrics(self) -> Iterator[Metric]:
        api = self._api
        yield InfoMetricFamily(
            "wsgateway_build",
            GAUGES["wsgateway_build_info"],
            {
                "version": __version__,
                "python": platform.python_version(),
            },
        )
        counts = {**api.control.counts_here(), "instances": len(api.cluster.others) + 1}
        status = api.readiness()["status"]
        counts |= {"ready": status != "unavailable", "degraded": status == "degraded"}
        for name, number in counts.items():
            full = f"wsgateway_{name}"
            yield GaugeMetricFamily(full, GAUGES[full], number)
        yield from _process()
        for field, meaning in descriptions().items():
            yield _family(field, meaning, getattr(api.metrics, field))


STARTED = time.time()

PROCESS = {
    "process_cpu_seconds_total": "User and system time.",
    "process_resident_memory_bytes": "Resident memory.",
    "process_open_fds": "Descriptors in use; before Linux 6.2, the lowest that is free.",
    "process_max_fds": "Descriptors that may be in use.",
    "process_start_time_seconds": "When the process was started, in seconds since 1970.",
}
"""As prometheus-client names them: its own collector looks at each descriptor, 11 ms for 10,000."""


def _process() -> Iterator[Metric]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used, most = descriptors()
    values = {
        "process_resident_memory_bytes": _resident_bytes(),
        "process_open_fds": used,
        "process_max_fds": most,
        "process_start_time_seconds": STARTED,
    }
    spent = "process_cpu_seconds_total"
    yield CounterMetricFamily(spent, PROCESS[spent], usage.ru_utime + usage.ru_stime)
    for name, value in values.items():
        yield GaugeMetricFamily(name, PROCESS[name], value)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _kind(value: Any) -> str:
    if isinstance(value, Histogram | Durations):
        return "histogram"
    # What maps labels to texts are states, of which one holds; a float is no count.
    return "gauge" if isinstance(value, float) or type(value) is dict else "counter"


def _name(field: str, value: Any) -> str:
    if field in NAMES:
        return f"wsgateway_{NAMES[field]}"
    return f"wsgateway_{field}_total" if _kind(value) == "counter" else f"wsgateway_{field}"


def _family(field: str, meaning: str, value: Any) -> Metric:
    name, kind, labels = _name(field, value), _kind(value), LABELS.get(field, "").split()
    if kind == "histogram":
        return _histogram(name, meaning, labels, value)
    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    if isinstance(value, int | float):
        return family(name, meaning, value * MICROS if field.endswith("_micros") else value)
    found = family(name, meaning, labels=labels)
    counted: dict[Any, Any] = dict.fromkeys(ZEROS.get(field, "").split(), 0) | value
    for label, item in counted.items():
        parts = label if isinstance(label, tuple) else (label,)
        parts, number = ((*parts, item), 1) if isinstance(item, str) else (parts, item)
        found.add_metric([str(part) for part in parts], number)
    return found


def _histogram(name: str, meaning: str, labels: list[str], value: Histogram | Durations) -> Metric:
    found = HistogramMetricFamily(name, meaning, labels=labels)
    if isinstance(value, Histogram):
        found.add_metric([], *_buckets(value))
    else:
        for label, each in value.histograms.items():
            found.add_metric([label], *_buckets(each))
    return found


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """What prometheus-client wants: how many are at most as large as each bound, and the sum."""
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total


def _line(sample: Sample) -> str:
    labels = ",".join([f'{name}="{_escape(text)}"' for name, text in sorted(sample.labels.items())])
    return f"{sample.name}{{{labels}}} {float(sample.value)!r}\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
