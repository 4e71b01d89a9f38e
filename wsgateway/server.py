"""The life of one instance, on one screen: build, run, drain, stop.

Entering a context means that its part is ready, leaving it that the part is done; the reverse
order of entering is the order of stopping.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wsgateway import __version__, handlers, logs, providers
from wsgateway.admission import Admission
from wsgateway.auth import Authenticator
from wsgateway.config import Config
from wsgateway.errors import ConfigError
from wsgateway.fanout import Fanout, Member
from wsgateway.gateway import Gateway
from wsgateway.hub import Hub
from wsgateway.listener import Listener
from wsgateway.metrics import Metrics
from wsgateway.session import Rules

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """An instance that is ready: where it listens, and its parts for those who look inside."""

    addresses: list[tuple[str, int]]
    gateway: Gateway
    listener: Listener
    admission: Admission
    authenticator: Authenticator
    metrics: Metrics


async def serve(
    config: Config,
    stop: asyncio.Event,
    *,
    ready: Callable[[Running], None] = lambda _: None,
    metrics: Metrics | None = None,
) -> None:
    """Run one instance until ``stop`` is set; return when every connection is gone.

    ``ready`` is called once devices can connect. Cancelling cuts every connection at once.

    Raises:
        GatewayError: it cannot start; one line says why.

    """
    metrics = metrics or Metrics()
    database = config.database()
    services = providers.build(config)
    rules = Rules(
        handlers.load(config.handlers.modules),
        config.limits.message_characters,
        config.handlers.timeout,
        metrics,
    )
    max_connections = connection_limit(config)
    hub: Hub[Member] = Hub()
    gateway = Gateway(hub, Fanout(hub, metrics, config.limits.fanout_bytes))
    authenticator = Authenticator(config.auth, database, metrics)
    admission = Admission(config, authenticator, gateway, rules, metrics)
    listener = Listener(
        config, admission, authenticator, gateway, services, metrics, max_connections
    )
    async with authenticator.running(listener.recheck_tokens), listener.open() as addresses:
        log.info(
            "wsgateway %s ready %s", __version__, _banner(addresses, max_connections, database)
        )
        ready(Running(addresses, gateway, listener, admission, authenticator, metrics))
        await stop.wait()
    log.info("stopped")


def run(config: Config, ready: Callable[[Running], None] = lambda _: None) -> None:
    """Run one instance until SIGTERM or SIGINT; a second signal ends it at once.

    ``ready`` is called once devices can connect.

    Raises:
        GatewayError: it cannot start; one line says why.

    """
    metrics = Metrics()
    with (
        logs.writing(config.log, metrics),
        asyncio.Runner(loop_factory=_loop_factory(config)) as runner,
    ):
        # Garbage of a connection is freed by reference count; rarer collections of the long-lived
        # rest cost fewer pauses (worst round trip 7.6 -> 2.6 ms with 100 connections).
        gc.set_threshold(50_000, 20, 100)
        gc.freeze()
        runner.run(_serve_until_signal(config, metrics, ready))


def connection_limit(config: Config) -> int:
    """How many connections fit: as configured, else the descriptor limit minus the reserve.

    The soft limit is raised to the hard one where that is allowed.

    Raises:
        ConfigError: more connections are configured than descriptors are to be had.

    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # forbidden by a system call filter
            log.warning("descriptor limit stays at %s: cannot be raised to %s", soft, hard)
    room = soft - config.limits.descriptor_reserve
    wanted = config.limits.connections
    if room < 1 or wanted > room:
        raise ConfigError(
            f"limits.connections = {wanted}: only {max(0, room)} fit under the descriptor limit of "
            f"{soft}: raise it (LimitNOFILE= in the unit, ulimit -n) or lower the key"
        )
    return wanted or room


async def _serve_until_signal(
    config: Config, metrics: Metrics, ready: Callable[[Running], None]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    serving = asyncio.current_task()
    assert serving is not None

    def on_signal() -> None:
        if stop.is_set():
            serving.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await serve(config, stop, ready=ready, metrics=metrics)
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        log.warning("stopped at once by a second signal")


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if config.runtime.loop == "uvloop":
        try:
            import uvloop
        except ImportError:
            log.warning("uvloop is not installed: running on asyncio, about three times slower")
        else:
            return uvloop.new_event_loop
    return None


def _banner(addresses: list[tuple[str, int]], max_connections: int, database: Path) -> str:
    loop = type(asyncio.get_running_loop()).__module__.split(".")[0]
    where = ",".join(f"{host}:{port}" for host, port in addresses)
    return (
        f"pid={os.getpid()} devices={where} max_connections={max_connections} "
        f"descriptors={resource.getrlimit(resource.RLIMIT_NOFILE)[0]} database={database} loop={loop}"
    )
