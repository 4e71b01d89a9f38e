"""Machines that run the JavaScript client: Node.js, and a page in headless Chromium.

Both run `driver.mjs`, which asks the test for commands over HTTP on loopback and reports there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

SERVED = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/driver.mjs": ("driver.mjs", "text/javascript"),
    "/device_client.mjs": ("device_client.mjs", "text/javascript"),
}
"""What the page is made of."""

LONG_POLL = 5
"""Seconds that a driver waits for a command before it asks again."""

CHROMIUM = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
"""A browser that talks to nobody but the page's server and the gateway."""

Event = dict[str, Any]


class Control(ThreadingHTTPServer):
    """The test's side: serves the page, hands out commands, keeps what is reported."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.commands: queue.Queue[list[Any]] = queue.Queue()
        self.events: defaultdict[int, list[Event]] = defaultdict(list)
        self.reported = threading.Condition()

    def next_command(self) -> list[Any]:
        try:
            return self.commands.get(timeout=LONG_POLL)
        except queue.Empty:
            return ["nothing", 0]

    def report(self, event: Event) -> None:
        with self.reported:
            self.events[event.pop("device")].append(event)
            self.reported.notify_all()


class _Requests(BaseHTTPRequestHandler):
    server: Control

    def do_GET(self) -> None:
        name, content_type = SERVED.get(self.path, (None, ""))
        if name is None:
            self.send_error(404)
        else:
            self._answer((HERE / name).read_bytes(), content_type)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/next":
            answer = self.server.next_command()
        else:
            answer = []
            self.server.report(body)
        self._answer(json.dumps(answer).encode(), "application/json")

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Device:
    """A client that runs in a machine."""

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine = machine
        self._number = number

    @property
    def events(self) -> list[Event]:
        """What the client reported, oldest first."""
        return self._machine.control.events[self._number]

    def of(self, name: str) -> list[Event]:
        """The events of a name."""
        return [event for event in self.events if event["event"] == name]

    def call(self, *calls: tuple[object, ...]) -> None:
        """Call methods, given as ("name", value...), all in one turn of the machine's loop."""
        self.command("call", *calls)

    def command(self, name: str, *values: object) -> None:
        self._machine.control.commands.put([name, self._number, *values])

    def wait(self, name: str, count: int = 1, seconds: float = 20) -> list[Event]:
        """Wait for so many events of a name; all there are by then."""
        control = self._machine.control
        with control.reported:
            there = control.reported.wait_for(lambda: len(self.of(name)) >= count, seconds)
        assert there, f"{count} x {name} did not come: {self.events}; {self._machine.last_words()}"
        return self.of(name)

    async def until(self, name: str, count: int = 1, seconds: float = 20) -> list[Event]:
        """As `wait`, while the loop runs."""
        return await asyncio.to_thread(self.wait, name, count, seconds)


class Machine:
    """A running Node.js or Chromium."""

    def __init__(self, kind: str, control: Control, popen: subprocess.Popen[bytes], log: Path):
        self.kind = kind
        self.control = control
        self._popen = popen
        self._log = log
        self._numbers = itertools.count(1)

    @property
    def origin(self) -> str | None:
        """What it sends as Origin."""
        return self.control.address if self.kind == "chromium" else None

    @contextlib.contextmanager
    def device(self, url: str, token: str, **options: float) -> Iterator[Device]:
        """A client that begins to connect; options are the client's, in milliseconds."""
        device = Device(self, next(self._numbers))
        device.command("create", token, url, options)
        device.call(("connect",))
        try:
            yield device
        finally:
            device.command("drop")

    def last_words(self) -> str:
        """What its process says about itself, for messages."""
        return f"{self.kind} ended with {self._popen.poll()}: {self._log.read_text()[-2000:]}"


@contextlib.contextmanager
def running_machine(kind: str, folder: Path) -> Iterator[Machine]:
    """A machine with its driver, which is killed at the end with everything it started."""
    control = Control()
    serving = threading.Thread(target=control.serve_forever, daemon=True)
    serving.start()
    log = folder / f"{kind}.log"
    try:
        with (
            log.open("wb") as output,
            subprocess.Popen(
                _node(control) if kind == "node" else _chromium(control, folder),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            ) as popen,
        ):  # fmt: skip
            try:
                machine = Machine(kind, control, popen, log)
                Device(machine, 0).wait("ready")
                yield machine
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(popen.pid, signal.SIGKILL)
    finally:
        control.shutdown()
        control.server_close()


def _node(control: Control) -> list[str]:
    node = _find("node", "nodejs")
    packages = Path(os.environ.get("WSGATEWAY_NODE_MODULES") or ROOT / ".venv" / "node").resolve()
    _install_packages(packages)
    return [node, str(HERE / "node.mjs"), control.address, str(packages)]


def _chromium(control: Control, folder: Path) -> list[str]:
    chromium = _find("chromium", "chromium")
    return [chromium, *CHROMIUM, f"--user-data-dir={folder / 'profile'}", control.address]


def _find(command: str, package: str) -> str:
    found = shutil.which(command)
    if found is None:
        pytest.fail(f"{command} is not here: install it (Debian: apt install {package})")
    return found


def _install_packages(folder: Path) -> None:
    """Install what package.json names, unless it is there."""
    wanted = (HERE / "package.json").read_bytes()
    stamp = folder / "node_modules" / ".wsgateway.json"
    if stamp.exists() and stamp.read_bytes() == wanted:
        return
    npm = _find("npm", "npm")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_bytes(wanted)
    done = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock",
         "--prefix", str(folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(
            f"npm could not install {HERE / 'package.json'} into {folder} (is a registry of"
            f" packages within reach?): {done.stdout}{done.stderr}"
        )
    stamp.write_bytes(wanted)
