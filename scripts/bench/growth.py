"""What a connection and a delivery cost as a fleet grows: both must stay flat.

One gateway on one core, this process on another; each row is a new gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from load import Load
from measure import CORES, PUBLISH, gateway, make_database

SIZES = (100, 1000, 5000, 10_000, 15_000)


SCRAPES = 20


def scrape_ms(api_port: int) -> float:
    """Milliseconds that /metrics takes, the median of some."""
    seconds = []
    for _ in range(SCRAPES):
        began = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{api_port}/metrics") as answer:
            assert b"wsgateway_connections" in answer.read()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of deliveries in each row")
    parser.add_argument("--port", type=int, default=8390)
    options = parser.parse_args()
    os.sched_setaffinity(0, CORES[-1:])
    print(
        "| connections | memory each, KiB | CPU per connect, us | CPU per delivery, us | "
        "scrape, ms |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "bench.db"
        asyncio.run(make_database(database, max(SIZES)))
        for place, count in enumerate(SIZES):
            port = options.port + 2 * place
            with gateway(database, port, keepalive__interval="5m", api__port=port + 1) as server:
                Load(server.port, 100).close()  # what is imported and allocated once
                memory, spent = server.memory(), server.cpu()
                load = Load(server.port, count)
                memory, spent = server.memory() - memory, server.cpu() - spent
                before = server.cpu()
                deliveries = load.deliveries(PUBLISH, 1, options.seconds)
                each = (server.cpu() - before) / deliveries
                scrape = scrape_ms(port + 1)
                load.close()
            print(
                f"| {count:,} | {memory / count / 1024:.1f} | {spent / count * 1e6:.0f} | "
                f"{each * 1e6:.2f} | {scrape:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
