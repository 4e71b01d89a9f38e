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
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    PlatformCollector,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

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
    "mirror_published": "fate",
    "mirror_rejected": "reason",
    "queue_items": "fate",
    "api_requests": "method route status",
    "reloads": "result",
}
"""The label of each counter that has one, or its labels in the order of its keys' parts."""

NAMES = {
    "compression_input_bytes": "compression_input_bytes_total",
    "compression_output_bytes": "compression_output_bytes_total",
    "reloaded_at": "reloaded_timestamp_seconds",
    "tls_certificate_expires": "tls_certificate_expires_timestamp_seconds",
    "received_bytes": "received_bytes_total",
    "sent_bytes": "sent_bytes_total",
}
"""Names that do not follow from the field's."""


def text(api: Api) -> bytes:
    """All metrics of one instance, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(api))
    PlatformCollector(registry=registry)
    return generate_latest(registry)


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


def names() -> dict[str, str]:
    """Every metric of the gateway's own, by name, with what it means."""
    told = {
        _name(field, getattr(Metrics(), field)): meaning
        for field, meaning in descriptions().items()
    }
    return {**GAUGES, **told, **PROCESS}


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


def _name(field: str, value: Any) -> str:
    if field in NAMES:
        return f"wsgateway_{NAMES[field]}"
    if isinstance(value, Histogram | Durations):
        return f"wsgateway_{field}"
    counts = field in LABELS or isinstance(value, int)
    return f"wsgateway_{field}_total" if counts else f"wsgateway_{field}"


def _family(field: str, meaning: str, value: Any) -> Metric:
    name = _name(field, value)
    if isinstance(value, Histogram):
        histogram = HistogramMetricFamily(name, meaning)
        histogram.add_metric([], *_buckets(value))
        return histogram
    if isinstance(value, Durations):
        histograms = HistogramMetricFamily(name, meaning, labels=[LABELS[field]])
        for label, each in value.histograms.items():
            histograms.add_metric([label], *_buckets(each))
        return histograms
    if field in LABELS:
        counters = CounterMetricFamily(name, meaning, labels=LABELS[field].split())
        for label, number in value.items():
            parts = label if isinstance(label, tuple) else (label,)
            counters.add_metric([str(part) for part in parts], number)
        return counters
    if isinstance(value, dict):
        states = GaugeMetricFamily(name, meaning, labels=["connection", "state"])
        for label, state in value.items():
            states.add_metric([label, state], 1)
        return states
    if isinstance(value, float):
        return GaugeMetricFamily(name, meaning, value)
    return CounterMetricFamily(name, meaning, value)


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """What prometheus-client wants: how many are at most as large as each bound, and the sum."""
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total
