"""Measure the gateway beside a bare server, in one run, and print a table of ratios.

The servers are pinned to one core, this process to another. Compared is the processor time that a
server spends per round trip, delivery and connect, which a busy machine blurs far less than the
clock: 1.0 means that the gateway with its tokens, limits, metrics and log costs no more than a
server that has none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from load import Load

from wsgateway import auth, store

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
"""The first is for what is measured, the last for who measures."""
PING = b'{"type":"ping","message":{},"timestamp":"2026-11-22T22:16:44.524Z"}'
PUBLISH = b'{"type":"publish","message":"0123456789012345678901234567890123456789"}'


class Server:
    """A server under test, with what the system says it used."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def make_database(path: Path, count: int) -> None:
    async with store.open_to_write(path, create=True) as db:
        for number in range(1, count + 1):
            user = await db.add_user(f"user-{number}")
            await db.bind(user, await db.add_device(f"device-{number}"))
            await db.add_token(auth.hash_token(f"bench-{number}"), user, "device")


@contextlib.contextmanager
def started(command: list[str], sign: str, stream: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, text=True, cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE if stream == "stdout" else subprocess.DEVNULL,
        stderr=subprocess.PIPE if stream == "stderr" else None,
        preexec_fn=lambda: os.sched_setaffinity(0, CORES[:1]),
    )  # fmt: skip
    try:
        output = getattr(process, stream)
        if not any(sign in line for line in output):
            raise SystemExit(f"did not start: {command}")
        if stream == "stderr":  # keep reading, as a log collector would
            subprocess.Popen(["cat"], stdin=output, stdout=subprocess.DEVNULL)
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def servers(folder: Path, port: int) -> Iterator[dict[str, Server]]:
    bare = [sys.executable, str(HERE / "bare_server.py"), str(port)]
    with (
        started(bare, "ready", "stdout") as first,
        gateway(folder / "bench.db", port + 1) as second,
    ):
        yield {"bare": Server(first, port), "gateway": second}


@contextlib.contextmanager
def gateway(database: Path, port: int, **settings: object) -> Iterator[Server]:
    """A gateway on the first core, with limits raised and everything else as shipped."""
    settings = {
        "server.host": "127.0.0.1", "server.port": port, "auth.database": database,
        "auth.cache_ttl": 0, "limits.messages": 1_000_000_000, "handlers.modules": "bench_handlers",
        "limits.connections_per_user": 100_000, "api.port": 0,
    } | {key.replace("__", "."): value for key, value in settings.items()}  # fmt: skip
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "wsgateway", "serve", *options]
    with started(command, " ready ", "stderr") as process:
        yield Server(process, port)


def cost(server: Server, count: int, work: Callable[[Load], int]) -> float:
    """Microseconds of processor time per unit of work with so many connections open."""
    load = Load(server.port, count)
    try:
        before = server.cpu()
        done = work(load)
        return (server.cpu() - before) / done * 1e6
    finally:
        load.close()


def connect_cost(server: Server, count: int) -> float:
    before = server.cpu()
    load = Load(server.port, count)
    spent = server.cpu() - before
    load.close()
    return spent / count * 1e6


def measure(both: dict[str, Server], connections: int, seconds: float) -> dict[str, list[float]]:
    """One pass over everything: name -> [bare, gateway]."""
    rows: dict[str, list[float]] = {}

    def row(name: str, of: Callable[[Server], float]) -> None:
        rows[name] = [of(server) for server in both.values()]

    row("memory per idle connection, KiB", lambda one: idle_memory(one, connections) / 1024)
    row("CPU per connect, us", lambda one: connect_cost(one, connections))
    for window in (1, 16):
        row(
            f"CPU per round trip, {window} in flight, us",
            lambda one, w=window: cost(one, 100, lambda load: load.round_trips(PING, w, seconds)),
        )
    for flying in (1, 16):
        row(
            f"CPU per delivery to 1,000, {flying} in flight, us",
            lambda one, n=flying: cost(
                one, 1000, lambda load: load.deliveries(PUBLISH, n, seconds)
            ),
        )
    return rows


def idle_memory(server: Server, count: int) -> float:
    before = server.memory()
    load = Load(server.port, count)
    used = server.memory() - before
    load.close()
    return used / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--port", type=int, default=8290)
    options = parser.parse_args()
    os.sched_setaffinity(0, CORES[-1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asyncio.run(make_database(folder / "bench.db", max(1000, options.connections)))
        passes = []
        for run in range(options.runs):
            # New servers for each run: memory is measured on a process that held nothing before.
            with servers(folder, options.port + 2 * run) as both:
                passes.append(measure(both, options.connections, options.seconds))
    print("| measured | bare server | gateway | ratio |\n|---|---|---|---|")
    for what in passes[0]:
        bare, gateway = (statistics.median(one[what][side] for one in passes) for side in (0, 1))
        print(f"| {what} | {bare:.1f} | {gateway:.1f} | {gateway / bare:.2f} |")


if __name__ == "__main__":
    main()
