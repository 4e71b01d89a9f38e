"""Sends from a backend: over HTTP to one device, and from one instance to another through Redis.

The gateway that is called is on one core, everything else on another. The second part needs
redis-server and is left out where that is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from load import Load, count_frames
from measure import CORES, gateway, make_database

from wsgateway import auth, store

KEY = "bench-key"
BODY = b'{"message":"0123456789"}'


def request(query: str = "") -> bytes:
    """A send to device 1."""
    head = (
        f"POST /api/devices/1/messages{query} HTTP/1.1\r\nHost: bench\r\nX-API-Key: {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


def sends(port: int, callers: int, seconds: float) -> float:
    """Calls a second, one under way on each of so many connections."""
    poll = select.epoll()
    connections = {}
    for _ in range(callers):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)
        connection.send(request())
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for descriptor, _ in poll.poll(1):
            answer = connections[descriptor].recv(65536)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"refused: {answer[:200]!r}")
            done += 1
            connections[descriptor].send(request())
    for connection in connections.values():
        connection.close()
    return done / seconds


def latencies(port: int, load: Load, count: int) -> list[float]:
    """Seconds from a call on one instance to its frame on a device of another, sorted."""
    caller = socket.create_connection(("127.0.0.1", port))
    [device] = load.sockets.values()
    device.setblocking(True)
    found = []
    for _ in range(count):
        began = time.perf_counter()
        caller.send(request("?wait=none"))
        while not count_frames(device.recv(65536))[0]:
            pass  # a ping
        found.append(time.perf_counter() - began)
        answer = caller.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"refused: {answer[:200]!r}")
        time.sleep(0.002)  # idle, as the promise says
    caller.close()
    return sorted(found)


async def prepare(database: Path) -> None:
    await make_database(database, 1)
    async with store.open_to_write(database) as db:
        await db.add_token(auth.hash_token(KEY), await db.add_user("backend"), "api")


def measure_http(database: Path, port: int, seconds: float) -> None:
    with gateway(database, port, api__port=port + 1) as server:
        load = Load(server.port, 1)
        for callers in (1, 16):
            before = server.cpu()
            rate = sends(port + 1, callers, seconds)
            spent = (server.cpu() - before) / (rate * seconds) * 1e6
            print(
                f"| HTTP send to one device, {callers} under way | {rate:,.0f}/s, {spent:.0f} us |"
            )
        load.close()


def measure_mirror(folder: Path, port: int) -> None:
    redis_port, database = port + 4, folder / "bench.db"
    redis = subprocess.Popen(
        ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""],
        cwd=folder, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        shared = {"redis__url": f"redis://127.0.0.1:{redis_port}/0"}
        with (
            gateway(database, port, server__instance="a", api__port=port + 1, **shared),
            gateway(database, port + 2, server__instance="b", **shared) as other,
        ):
            load = Load(other.port, 1)
            found = latencies(port + 1, load, 2000)
            load.close()
        median, p99 = (found[int(len(found) * share)] * 1000 for share in (0.5, 0.99))
        print(f"| HTTP, Redis, other instance, device | p50 {median:.1f} ms, p99 {p99:.1f} ms |")
    finally:
        redis.terminate()
        redis.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--port", type=int, default=8490)
    options = parser.parse_args()
    os.sched_setaffinity(0, CORES[-1:])
    print("| measured | |\n|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asyncio.run(prepare(folder / "bench.db"))
        measure_http(folder / "bench.db", options.port, options.seconds)
        if shutil.which("redis-server"):
            measure_mirror(folder, options.port + 10)


if __name__ == "__main__":
    main()
