"""`wsgateway serve`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from wsgateway import demo, handlers, server
from wsgateway.cli import settings
from wsgateway.errors import UsageError


def serve(arguments: argparse.Namespace) -> None:
    """Run the gateway until a signal."""
    loaded = settings.load(arguments)
    if arguments.check:
        handlers.load(loaded.config.handlers.modules)
        print(f"configuration ok ({loaded.file or 'defaults'})")
        return
    if not arguments.demo:
        server.run(loaded.config)
        return
    for key, own in (("server.host", "127.0.0.1"), ("auth.database", None)):
        section, name = key.split(".")
        if (
            loaded.origins[key] == "command line"
            and getattr(getattr(loaded.config, section), name) != own
        ):
            raise UsageError(
                f"--demo has a loopback address and a database of its own: leave out {key}"
            )
    config, token = asyncio.run(demo.prepare(loaded.config))
    server.run(config, ready=lambda running: _say_what_next(running, token))


def _say_what_next(running: server.Running, token: str) -> None:
    url = f"ws://127.0.0.1:{running.addresses[0][1]}/ws/device/?token={token}"
    print(
        f"""wsgateway demo: one user, one device, on this machine only.

In another terminal, be the device:

    {_python()} -m websockets '{url}'

and type

    {{"type": "ping"}}
    {{"type": "sing", "message": {{"song": "青花瓷", "artist": "周杰伦"}}}}

Ctrl+C stops the gateway.
""",
        flush=True,
    )


def _python() -> str:
    """The interpreter as the reader would type it."""
    return ".venv/bin/python" if sys.prefix.endswith("/.venv") else sys.executable
