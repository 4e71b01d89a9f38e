"""The dashboard shows and does in a real browser what the HTTP API says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession
from websockets.asyncio.client import ClientConnection, connect

from tests.clients.machines import CHROMIUM
from tests.conftest import Accounts, Instance

pytestmark = pytest.mark.browser


class Page:
    """A page in Chromium, moved through its DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.said: list[str] = []
        """What went to the console, and what the page's policy forbade."""

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send(
            orjson.dumps({"id": number, "method": method, "params": parameters}).decode()
        )
        async with asyncio.timeout(20):
            while True:
                word = orjson.loads(await self._socket.recv())
                if word.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                    self.said.append(str(word["params"]))
                if word.get("id") == number:
                    return word["result"]

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True)
        return answer["result"].get("value")

    async def until(self, script: str, wanted: object) -> None:
        """Look at an expression until it has a value."""
        async with asyncio.timeout(20):
            while await self.run(script) != wanted:
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Page]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is not here: install it (Debian: apt install chromium)"
    log = folder / "chromium.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [chromium, *CHROMIUM, f"--user-data-dir={folder / 'profile'}",
             "--remote-debugging-port=0", url],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        ) as popen,
    ):  # fmt: skip
        try:
            async with asyncio.timeout(30):
                while not (found := re.search(r"ws://([\d.:]+)/", log.read_text())):
                    assert popen.poll() is None, log.read_text()
                    await asyncio.sleep(0)
            async with ClientSession() as session, session.get(f"http://{found[1]}/json") as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
            async with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
                page = Page(socket)
                await page.call("Runtime.enable")
                await page.call("Log.enable")
                yield page
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)


async def test_an_operator_looks_sends_and_cuts(
    gateway: Instance, accounts: Accounts, tmp_path: Path
) -> None:
    key = await accounts.add_token(scope="admin")
    async with gateway.device() as device, opened(f"{gateway.api_url}/", tmp_path) as page:
        # Before its script has run, the page would post the form itself.
        await page.until("document.readyState", "complete")
        await page.until("document.querySelector('main').hidden", True)

        await page.run("key_ = document.getElementById('key'); key_.value = 'wrong'")
        await page.run("document.querySelector('#login button').click()")
        await page.until("document.getElementById('trouble').textContent.slice(0, 3)", "401")

        await page.run(f"key_.value = {key!r}; document.querySelector('#login button').click()")
        await page.until("document.querySelector('main').hidden", False)
        await page.until("document.querySelectorAll('#connections tr').length", 1)
        cells = "[...document.querySelectorAll('#instances td')].map(c => c.textContent).join()"
        assert await page.run(cells) == "here,1,1,1"

        await page.run("document.getElementById('id').value = '1'")
        await page.run("document.getElementById('message').value = '{\"text\": \"<b>hi\"}'")
        await page.run("document.querySelector('#send button').click()")
        received = orjson.loads(await device.recv())
        assert (received["type"], received["message"]) == ("system", {"text": "<b>hi"})
        await page.until("document.getElementById('receipt').textContent", "written to 1 of 1")

        await page.run("document.querySelector('#connections button').click()")
        await device.wait_closed()
        assert device.close_code == 4003
        await page.until("document.querySelectorAll('#connections tr').length", 0)
        assert [line for line in page.said if "401" not in line and "favicon" not in line] == []
