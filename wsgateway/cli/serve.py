"""`wsgateway serve`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from wsgateway import demo, handlers, server
from wsgateway.cli import settings
from wsgateway.config import Config


def serve(arguments: argparse.Namespace) -> None:
    """Run the gateway until a signal."""
    loaded = settings.load(arguments)
    if arguments.check:
        handlers.load(loaded.config.handlers.modules)
        print(f"configuration ok ({loaded.file or 'defaults'})")
        return
    config = loaded.config
    if arguments.demo:
        config, token = asyncio.run(demo.prepare(config))
        _say_what_next(config, token)
    server.run(config)


def _say_what_next(config: Config, token: str) -> None:
    url = f"ws://127.0.0.1:{config.server.port}/ws/device/?token={token}"
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
