"""The life of one instance, on one screen: build, run, drain, stop.

Entering a context means that its part is ready, leaving it that the part is done; the reverse
order of entering is the order of stopping.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import re
import resource
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from wsgateway import __version__, background, dump, handlers, logs, providers
from wsgateway.accounts import Accounts
from wsgateway.admission import Admission
from wsgateway.auth import Authenticator
from wsgateway.cluster import Cluster
from wsgateway.config import Config, Loaded
from wsgateway.control import Control
from wsgateway.errors import ConfigError
from wsgateway.fanout import Fanout, Member
from wsgateway.gateway import Gateway
from wsgateway.health import Health
from wsgateway.hub import Hub
from wsgateway.listener import Listener
from wsgateway.metrics import Metrics
from wsgateway.providers.changeover import Changeover
from wsgateway.reload import Apply, Configure, Reloader
from wsgateway.roster import Roster
from wsgateway.sends import Sends
from wsgateway.session import Rules
from wsgateway.signals import Signals
from wsgateway.systemd import Service
from wsgateway.tls import Tls

if TYPE_CHECKING:
    from wsgateway.federation import Federation
    from wsgateway.ingest import Ingest

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long a stop may take besides the drain, in seconds: what was promised (2) and some more."""


@dataclass(frozen=True)
class Instance:
    """The parts of one instance, complete and not yet running."""

    gateway: Gateway
    fanout: Fanout
    listener: Listener
    admission: Admission
    health: Health
    authenticator: Authenticator
    accounts: Accounts
    cluster: Cluster
    sends: Sends
    roster: Roster
    control: Control
    changeover: Changeover
    federation: Federation | None
    tls: Tls | None
    metrics: Metrics


@dataclass(frozen=True)
class Running:
    """An instance that is ready: where it listens, and its parts for those who look inside."""

    addresses: list[tuple[str, int]]
    api_address: tuple[str, int] | None
    instance: Instance
    reloader: Reloader


async def serve(
    config: Config,
    stop: asyncio.Event,
    *,
    ready: Callable[[Running], None] = lambda _: None,
    metrics: Metrics | None = None,
    service: Service | None = None,
    read: Callable[[], Loaded] | None = None,
    outer: Iterable[Configure] = (),
) -> None:
    """Run one instance until ``stop`` is set; return when every connection is gone.

    ``ready`` is called once devices can connect. Cancelling cuts every connection at once.
    ``service`` hears how things are, and may have brought sockets.

    A reload takes what ``read`` returns, where that is given, and gives it to ``outer`` as well.

    Raises:
        GatewayError: it cannot start; one line says why.

    """
    config = named(config)
    instance = build(config, metrics or Metrics())
    service = service or Service({})
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        await enter(background.running(_report(service, instance)))
        await enter(instance.changeover.running(instance.listener.services.running))
        await enter(instance.authenticator.running(instance.listener.recheck_tokens))
        queue = await enter(instance.federation.running(instance)) if instance.federation else None
        reloader = Reloader(
            config,
            read or (lambda: Loaded(config, {}, None, ())),
            instance.metrics,
            service.reloading,
        )
        make_reloadable(reloader, instance, outer)
        api_address = await enter(_open_api(config, instance, queue, reloader, service))
        addresses = await enter(instance.listener.open(service.sockets.get("ws")))
        await enter(reloader.open())
        log.info("wsgateway %s ready %s", __version__, _banner(config, addresses, api_address))
        ready(Running(addresses, api_address, instance, reloader))
        service.notify_ready()
        await stop.wait()
        drain = reloader.running.drain
        service.notify_stopping(drain.delay + drain.window + STOP_SECONDS)
    log.info("stopped")


def build(config: Config, metrics: Metrics) -> Instance:
    """The parts of an instance. Raises ConfigError."""
    name, database = config.server.instance, config.database()
    rules = Rules(
        handlers.load(config.handlers.modules),
        config.limits.message_characters,
        config.handlers.timeout,
        metrics,
    )
    federation = _federation(config, metrics)
    mirror = federation.mirror if federation else None
    hub: Hub[Member] = Hub()
    fanout = Fanout(hub, metrics, config.limits.fanout_bytes)
    gateway = Gateway(hub, fanout, mirror, metrics)
    authenticator = Authenticator(config.auth, database, metrics)
    health = Health(config, authenticator, gateway)
    admission = Admission(config, authenticator, gateway, rules, health, metrics)
    cluster = Cluster(name, mirror, metrics)
    roster = Roster(hub, name)
    accounts = Accounts(database, authenticator)
    tls = Tls(config, metrics) if config.server.tls or config.api.tls else None
    return Instance(
        gateway=gateway,
        fanout=fanout,
        listener=Listener(
            config,
            admission,
            authenticator,
            gateway,
            providers.build(config, metrics),
            health,
            metrics,
            connection_limit(config),
            tls if config.server.tls else None,
        ),
        admission=admission,
        health=health,
        authenticator=authenticator,
        accounts=accounts,
        cluster=cluster,
        sends=Sends(gateway, cluster, mirror, metrics),
        roster=roster,
        control=Control(cluster, roster, accounts),
        changeover=Changeover(),
        federation=federation,
        tls=tls,
        metrics=metrics,
    )


def make_reloadable(reloader: Reloader, instance: Instance, outer: Iterable[Configure]) -> None:
    """Say what a reload changes: every part that keeps something of the configuration is here."""
    listener = instance.listener

    def prepare_limit(_: Config, wanted: Config) -> Apply:
        most = connection_limit(wanted)

        async def apply() -> None:
            listener.resize(most)

        return apply

    def prepare_services(running: Config, wanted: Config) -> Apply | None:
        if (running.weather, running.chat) == (wanted.weather, wanted.chat):
            return None
        services = providers.build(wanted, instance.metrics)

        async def apply() -> None:
            longest = max(running.handlers.timeout, wanted.handlers.timeout)
            await instance.changeover.change(services.running, longest)
            listener.services = services

        return apply

    certificates = [instance.tls.prepare] if instance.tls else []
    reloader.prepares += [prepare_limit, prepare_services, *certificates]
    parts = (
        instance.admission, instance.authenticator, instance.health, listener, instance.fanout
    )  # fmt: skip
    reloader.parts += [*outer, *(part.configure for part in parts)]
    if instance.federation is not None:
        reloader.parts.append(instance.federation.configure)


def named(config: Config) -> Config:
    """The configuration with a name for this instance: the host's with a random ending if none."""
    if config.server.instance:
        return config
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:50]
    server = msgspec.structs.replace(config.server, instance=f"{host}-{secrets.token_hex(3)}")
    return msgspec.structs.replace(config, server=server)


def _federation(config: Config, metrics: Metrics) -> Federation | None:
    if not config.redis.url:
        return None
    from wsgateway.federation import Federation  # redis is imported only where it is used

    return Federation(config, secrets.token_hex(4), metrics)


@contextlib.asynccontextmanager
async def _open_api(
    config: Config, instance: Instance, queue: Ingest | None, reloader: Reloader, service: Service
) -> AsyncIterator[tuple[str, int] | None]:
    passed = service.sockets.get("http")
    if not config.api.enabled:
        if passed:
            raise ConfigError("the socket http was passed, but api.enabled = false: drop one")
        yield None
        return
    from wsgateway.api.context import Api  # aiohttp is imported only where it is used
    from wsgateway.api.listener import Listener as ApiListener

    api = Api.of(config, instance, queue, reloader.reload)
    tls, proxies = instance.tls, instance.listener.proxies
    listener = ApiListener(config.api, api, instance.authenticator, tls, proxies)
    reloader.parts += [api.configure, listener.configure]
    async with listener.open(passed) as address:
        yield address


def run(
    config: Config,
    signals: Signals,
    read: Callable[[], Loaded],
    ready: Callable[[Running], None] = lambda _: None,
) -> None:
    """Run one instance until a signal stops it.

    ``read`` reads the configuration again for a reload; ``ready`` is called once devices can
    connect.

    Raises:
        GatewayError: it cannot start; one line says why.

    """
    nameless, metrics = config, Metrics()
    service = Service(os.environ)
    config = named(config)

    def read_again() -> Loaded:
        loaded = read()
        server = loaded.config.server
        if server.instance == nameless.server.instance:  # "" stands for the name that was made up
            server = msgspec.structs.replace(server, instance=config.server.instance)
        same = msgspec.structs.replace(loaded.config, server=server)
        return dataclasses.replace(loaded, config=same)

    with (
        logs.writing(config.log, metrics, config.server.instance) as configure_log,
        asyncio.Runner(loop_factory=_loop_factory(config)) as runner,
    ):
        # Garbage of a connection is freed by reference count; rarer collections of the long-lived
        # rest cost fewer pauses (worst round trip 7.6 -> 2.6 ms with 100 connections).
        gc.set_threshold(50_000, 20, 100)
        gc.freeze()
        runner.run(
            _serve_until_signal(
                config,
                signals,
                ready,
                metrics=metrics,
                service=service,
                read=read_again,
                outer=[lambda config: configure_log(config.log)],
            )
        )


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
    config: Config, signals: Signals, ready: Callable[[Running], None], **options: Any
) -> None:
    stop = asyncio.Event()
    serving = asyncio.current_task()
    assert serving is not None

    def on_signal() -> None:
        if stop.is_set():
            serving.cancel()
        stop.set()

    def on_ready(running: Running) -> None:
        instance = running.instance
        signals.answer_with(
            running.reloader.wish,
            lambda: dump.write(instance.metrics, instance.roster.counts()),
        )
        ready(running)

    signals.stop_with(on_signal)
    try:
        await serve(config, stop, ready=on_ready, **options)
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        log.warning("stopped at once by a second signal")


async def _report(service: Service, instance: Instance) -> None:
    """Tell systemd how things are, for ever."""
    federation = instance.federation

    def describe() -> str:
        counts = instance.roster.counts()
        mirror = federation.state if federation else "off"
        return f"connections={counts['connections']} users={counts['users']} mirror={mirror}"

    await service.report(describe, lambda: federation is None or federation.is_turning)


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if config.runtime.loop == "uvloop":
        try:
            import uvloop
        except ImportError:
            log.warning("uvloop is not installed: running on asyncio, about three times slower")
        else:
            return uvloop.new_event_loop
    return None


def _banner(
    config: Config, addresses: list[tuple[str, int]], api_address: tuple[str, int] | None
) -> str:
    loop = type(asyncio.get_running_loop()).__module__.split(".")[0]
    where = ",".join(f"{host}:{port}" for host, port in addresses)
    api = f"{api_address[0]}:{api_address[1]}" if api_address else "off"
    return (
        f"pid={os.getpid()} instance={config.server.instance} devices={where} api={api} "
        f"redis={'on' if config.redis.url else 'off'} max_connections={connection_limit(config)} "
        f"descriptors={resource.getrlimit(resource.RLIMIT_NOFILE)[0]} "
        f"database={config.database()} loop={loop}"
    )
