"""What Prometheus reads: every metric, well formed, cheap, and counted where it says."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Accounts, Instance, RedisServer, ask, eventually
from tests.test_cluster import pair
from tests.test_device_socket import fetch, request
from wsgateway.api import exposition
from wsgateway.hub import Hub
from wsgateway.metrics import Metrics
from wsgateway.roster import Roster

Samples = dict[str, dict[tuple[str, ...], float]]


async def scrape(gateway: Instance) -> tuple[list[Metric], Samples]:
    """The families, and by sample name the values by label values, in the labels' order."""
    async with ClientSession() as session, session.get(f"{gateway.api_url}/metrics") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        families = list(text_string_to_metric_families(await answer.text()))
    samples: Samples = defaultdict(dict)
    for family in families:
        for name, labels, value, *_ in family.samples:
            key = tuple(text for label, text in labels.items() if label != "instance_name")
            samples[name][key] = value
    return families, samples


async def test_every_metric_is_told_with_its_type_and_labels(gateway: Instance) -> None:
    async with gateway.device() as device:
        await ask(device, {"type": "weather"})
    await fetch(gateway, request("/nowhere", upgrade=()))
    families, _ = await scrape(gateway)
    told = {}
    for family in families:
        suffix = "_total" if family.type == "counter" else ""
        told[family.name + suffix] = family
    for name, (kind, labels, meaning) in exposition.catalogue().items():
        family = told.pop(name)
        assert family.documentation == meaning
        assert family.type == ("gauge" if kind == "info" else kind)
        for sample in family.samples:
            assert {*sample.labels} - {"le"} == {*labels, "instance_name"}
            assert sample.labels["instance_name"] == "here"
    assert {*told} == {"python_info"}


@pytest.mark.parametrize("name", exposition.catalogue())
def test_names_follow_the_conventions(name: str) -> None:
    kind, labels, meaning = exposition.catalogue()[name]
    assert name.endswith("_total") == (kind == "counter")
    assert not {"user", "device", "token", "instance", "job", "le"} & {*labels}
    assert not any(unit in name for unit in ("milli", "micros", "minutes", "hours", "kb", "_ms"))
    if kind == "histogram":
        assert name.endswith("_seconds")
    assert meaning.endswith(".")


def test_labels_and_names_are_of_fields_that_there_are() -> None:
    fields = exposition.descriptions().keys()
    assert fields == {*Metrics.__dataclass_fields__}
    for table in (exposition.LABELS, exposition.ZEROS, exposition.NAMES):
        assert table.keys() <= fields


def api_of(metrics: Metrics, hub: Hub[Any]) -> Any:
    """What is scraped, without a gateway around it."""
    return SimpleNamespace(
        metrics=metrics,
        control=SimpleNamespace(counts_here=Roster(hub, "here").counts),
        cluster=SimpleNamespace(name="here", others=[]),
        readiness=lambda: {"status": "ok"},
    )


def test_what_a_users_type_is_called_breaks_nothing() -> None:
    metrics = Metrics()
    name = 'a "type"\\ of\nthree lines \n'
    metrics.received[name] += 1
    metrics.handler_seconds.note(name, 0.1)
    text = exposition.text(api_of(metrics, Hub())).decode()
    families = text_string_to_metric_families(text)
    received = next(one for one in families if one.name == "wsgateway_received")
    assert [(one.labels["type"], one.value) for one in received.samples] == [(name, 1)]


async def test_a_device_is_counted_from_its_handshake_to_its_end(gateway: Instance) -> None:
    async with gateway.device() as device, gateway.device():
        _, before = await scrape(gateway)
        for message in ({"type": "ping"}, {"type": "weather"}, {"type": "?"}, "no json"):
            await ask(device, message)
        async with ClientSession(gateway.api_url) as session:
            await session.get("/api/nowhere/at-all")
            await session.request("PURGE", "/metrics")
            await session.get("/api/users/7")
        _, during = await scrape(gateway)
    metrics = gateway.running.instance.metrics
    await eventually(lambda: sum(metrics.closed.values()) == 2)
    await eventually(lambda: sum(metrics.loop_lag_seconds.counts))
    _, after = await scrape(gateway)
    assert [now["wsgateway_connections"][()] for now in (before, during, after)] == [2, 2, 0]
    assert [now["wsgateway_users"][()] for now in (before, during, after)] == [1, 1, 0]
    assert [now["wsgateway_devices"][()] for now in (before, during, after)] == [1, 1, 0]
    assert during["wsgateway_ready"] == {(): 1}
    assert during["wsgateway_degraded"] == {(): 0}
    assert during["wsgateway_handshake_seconds_count"] == {(): 2}
    assert during["wsgateway_lookup_seconds_count"] == {("database",): 1}
    assert during["wsgateway_received_total"] == {("ping",): 1, ("weather",): 1, ("unknown",): 1}
    assert during["wsgateway_sent_total"] == {
        ("ping",): 1, ("weather",): 1, ("error",): 2, ("connection_status",): 2,
    }  # fmt: skip
    assert during["wsgateway_handler_seconds_count"] == {("weather",): 1}
    assert during["wsgateway_connection_seconds_count"] == {(): 0}
    assert after["wsgateway_connection_seconds_count"] == {(): 2}
    assert after["wsgateway_loop_lag_seconds_count"][()] > 0
    # As the labels are written: method, route, status.
    assert during["wsgateway_api_requests_total"] == {
        ("GET", "/metrics", "200"): 1,
        ("GET", "/api/users/{user_id}", "401"): 1,
        ("other", "other", "404"): 1,
        ("other", "other", "405"): 1,
    }
    assert during["wsgateway_api_seconds_count"] == {
        ("GET /api/users/{user_id}",): 1,
    }


async def test_whatever_callers_ask_for_makes_no_new_series(gateway: Instance) -> None:
    async with ClientSession(gateway.api_url) as session:
        for number in range(50):
            await session.request("PROPFIND", f"/{number}")
            await session.get(f"/api/users/{number}")
        host, port = gateway.running.api_address or ("", 0)
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"\x16\x03 this is no HTTP\r\n\r\n")
        assert b"400" in await reader.readline()
        writer.close()
    requests = gateway.running.instance.metrics.api_requests
    assert requests == {
        ("other", "other", 404): 50,
        ("other", "other", 400): 1,
        ("GET", "/api/users/{user_id}", 401): 50,
    }


async def test_what_alerts_wait_for_is_there_before_it_happens(gateway: Instance) -> None:
    _, samples = await scrape(gateway)
    for field, labels in exposition.ZEROS.items():
        name = f"wsgateway_{field}_total"
        assert {(label,) for label in labels.split()} <= samples[name].keys()
        assert not any(samples[name].values()), name


async def test_redis_the_queue_and_receipts_are_timed(
    accounts: Accounts, redis_server: RedisServer
) -> None:
    async with (
        pair(accounts, redis_server) as p,
        p.b.device() as device,
    ):
        await p.redis.rpush("wsgateway:rejected", "a", "b")
        status, receipt = await p.send(p.a, 1, "hello")
        assert (status, receipt["complete"]) == (200, True)
        assert orjson.loads(await device.recv())["message"] == "hello"
        metrics = p.a.running.instance.metrics
        other = p.b.running.instance.metrics
        # The one that holds the lease looks every few seconds.
        await eventually(lambda: {metrics.queue_rejected, other.queue_rejected} == {0, 2}, 20)
        _, samples = await scrape(p.a)
        assert samples["wsgateway_receipt_seconds_count"] == {(): 1}
        assert samples["wsgateway_mirror_lag_seconds_count"][()] >= 1
        assert samples["wsgateway_instances"] == {(): 2}
        states = samples["wsgateway_redis_states"]
        assert {labels: states[labels] for labels in states if "subscriber" in labels} == {
            ("subscriber", "up"): 1
        }
        _, elsewhere = await scrape(p.b)
        assert elsewhere["wsgateway_sent_total"]["group",] == 1


async def test_what_is_sent_is_counted_by_what_it_answers(gateway: Instance) -> None:
    async with gateway.device() as device:
        await ask(device, {"type": "ping"})
        connection: Any = next(iter(gateway.running.instance.gateway.hub.members("all")))
        assert connection.send({"type": "a word of a client"})
        assert orjson.loads(await device.recv())["type"] == "a word of a client"
        sent = gateway.running.instance.metrics.sent
        assert sent == {"connection_status": 1, "ping": 1, "more": 1}


def test_the_process_is_told_as_the_library_tells_it() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    theirs = {one.name: one for one in registry.collect()}
    told = text_string_to_metric_families(exposition.text(api_of(Metrics(), Hub())).decode())
    ours = {one.name: one for one in told if one.name.startswith("process_")}
    assert {f"process_{name}" for name in ("cpu_seconds", "open_fds", "max_fds")} < ours.keys()
    for name, our in ours.items():
        assert our.type == theirs[name].type
        (our_sample,), (their_sample,) = our.samples, theirs[name].samples
        assert our_sample.name == their_sample.name
        # It started a while before it could say so.
        allowed = 600 if name == "process_start_time_seconds" else 2
        assert our_sample.value == pytest.approx(their_sample.value, rel=0.05, abs=allowed)


def least_seconds(work: Callable[[], object]) -> float:
    """The least that a work takes of many tries: what a busy machine adds is left out."""
    best = float("inf")
    for _ in range(40):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def test_a_scrape_costs_the_same_with_ten_thousand_devices() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hub: Hub[Any] = Hub()
    api = api_of(Metrics(), hub)
    alone = least_seconds(lambda: exposition.text(api))
    opened: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for number in range(min(10_000, hard - 1000)):
            for group in ("all", f"user_{number}", f"device_{number}"):
                hub.join(group, number)
            opened.append(os.open("/", os.O_PATH))
        assert f'wsgateway_users{{instance_name="here"}} {len(opened)}.0'.encode() in (
            exposition.text(api)
        )
        assert least_seconds(lambda: exposition.text(api)) < 3 * alone
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
