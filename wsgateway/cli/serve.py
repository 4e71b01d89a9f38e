"""`wsgateway serve`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys

from wsgateway import demo, server
from wsgateway.cli import settings
from wsgateway.config import Loaded
from wsgateway.signals import Signals


def serve(arguments: argparse.Namespace) -> None:
    """Run the gateway until a signal."""
    signals = Signals()
    loaded = settings.load(arguments)
    if arguments.check:
        settings.check(loaded)
        return

    def read() -> Loaded:
        # The same file as before: that one must not vanish and another take its place.
        return settings.read(arguments, loaded.file)

    if not arguments.demo:
        server.run(loaded.config, signals, read)
        return
    made = asyncio.run(demo.prepare(loaded.config))

    def ready(running: server.Running) -> None:
        if "command line" in (loaded.origins["server.host"], loaded.origins["auth.database"]):
            print("--demo has a loopback address and a database of its own.", file=sys.stderr)
        _say_what_next(running, made)

    def read_demo() -> Loaded:
        again = read()
        return dataclasses.replace(again, config=demo.confined(again.config))

    server.run(made.config, signals, read_demo, ready)


def _say_what_next(running: server.Running, made: demo.Demo) -> None:
    url = f"ws://127.0.0.1:{running.addresses[0][1]}/ws/device/?token={made.token}"
    print(
        f"""wsgateway demo: one user, one device, on this machine only.

In another terminal, be the device:

    {_python()} -m websockets '{url}'

and type

    {{"type": "ping"}}
    {{"type": "sing", "message": {{"song": "青花瓷", "artist": "周杰伦"}}}}
{_say_how_to_send(running, made)}
Ctrl+C stops the gateway.
""",
        flush=True,
    )


def _say_how_to_send(running: server.Running, made: demo.Demo) -> str:
    if running.api_address is None:
        return ""
    port = running.api_address[1]
    return f"""
In a third one, be the backend:

    curl http://127.0.0.1:{port}/api/devices/1/messages -H 'Content-Type: application/json' \\
        -H 'X-API-Key: {made.key}' -d '{{"message": "hello"}}'
"""


def _python() -> str:
    """The interpreter as the reader would type it."""
    return ".venv/bin/python" if sys.prefix.endswith("/.venv") else sys.executable
