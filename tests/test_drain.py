"""A fleet is sent away so that it comes back, and whoever stalls delays nobody's end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from aiohttp import ClientSession
from websockets.asyncio.client import connect

from tests.conftest import Accounts, Process, eventually, running_gateway
from tests.test_device_socket import request

STALLED = 50
WINDOW = 2


@contextlib.contextmanager
def stalled_readers(gateway: Process, token: str) -> Iterator[None]:
    """Devices that were let in and read nothing more."""
    with contextlib.ExitStack() as stack:
        for _ in range(STALLED):
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.settimeout(10)
            peer.connect(("127.0.0.1", gateway.port))
            peer.sendall(request(f"/ws/device/?token={token}"))
            said = b""
            while b"connection_status" not in said:
                said += peer.recv(1024)
        yield


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_fifty_stalled_readers_do_not_hold_it_and_a_call_under_way_is_answered(
    accounts: Accounts, serve: Callable[..., Process], loop: str
) -> None:
    key = await accounts.add_token(scope="admin")
    gateway = await asyncio.to_thread(
        serve, "--host", "127.0.0.1", "--database", str(accounts.path), "--loop", loop,
        "--set", f"drain.window={WINDOW}s", "--set", "limits.outbound_bytes=100MiB",
        "--set", "limits.outbound_stall=1h",
    )  # fmt: skip
    url = f"http://127.0.0.1:{gateway.api_port}"
    async with ClientSession(headers={"X-API-Key": key}) as session:
        with stalled_readers(gateway, accounts.token):
            for number in range(100):
                body = {"message": f"{number}" * 20_000}
                async with session.post(f"{url}/api/broadcast", json=body) as answer:
                    assert (await answer.json())["delivery"]["matched"] == STALLED
            async with connect(
                f"ws://127.0.0.1:{gateway.port}/ws/device/?token={accounts.token}"
            ) as device:
                await device.recv()
                call = begin_call(gateway, key)
                began = time.monotonic()
                gateway.popen.send_signal(signal.SIGTERM)
                await device.wait_closed()
                assert device.close_code == 1012
                async with session.get(f"{url}/readyz") as answer:
                    assert (await answer.json())["reasons"] == ["draining"]
                assert b" 200 OK\r\n" in end_call(call)
            assert await asyncio.to_thread(gateway.popen.wait, 20) == 0
            slack = 2  # for the machine
            assert time.monotonic() - began < WINDOW + 2 + slack
    assert "Traceback" not in gateway.log.read_text()


BODY = b'{"message": "the last"}'


def begin_call(gateway: Process, key: str) -> socket.socket:
    """A call whose body has not come yet."""
    call = socket.create_connection(("127.0.0.1", gateway.api_port), timeout=10)
    call.sendall(
        f"POST /api/broadcast HTTP/1.1\r\nHost: h\r\nX-API-Key: {key}\r\nContent-Length: "
        f"{len(BODY)}\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode()
    )
    assert call.recv(1024).startswith(b"HTTP/1.1 100")
    return call


def end_call(call: socket.socket) -> bytes:
    with call:
        call.sendall(BODY)
        return call.recv(4096)


async def test_a_fleet_is_told_to_come_back_over_the_time_that_an_instance_needs_for_it(
    accounts: Accounts,
) -> None:
    overrides: dict[str, object] = {"drain__return_rate": 5, "drain__window": 3}
    async with (
        running_gateway(accounts, **overrides) as gateway,
        contextlib.AsyncExitStack() as stack,
    ):
        devices = [await stack.enter_async_context(gateway.device()) for _ in range(40)]
        gateway.stop.set()
        await asyncio.gather(*(device.wait_closed() for device in devices))
        hints = [json.loads(device.close_reason or "")["retry_ms"] for device in devices]
        assert {device.close_code for device in devices} == {1012}
        assert max(hints) <= 8000
        assert max(hints) - min(hints) > 2000, "spread over 40 / 5 s"
        assert len(set(hints)) > 30


async def test_idle_devices_go_first_and_busy_ones_once_they_have_their_answer(
    accounts: Accounts,
) -> None:
    overrides: dict[str, object] = {
        "handlers__modules": "tests.slow_handlers", "drain__window": 8, "drain__grace": 4,
    }  # fmt: skip
    async with (
        running_gateway(accounts, **overrides) as gateway,
        gateway.device() as busy,
        gateway.device() as idle,
    ):
        await busy.send('{"type": "wait_a_second"}')
        listener = gateway.running.instance.listener
        await eventually(lambda: any(one.busy for one in listener._connections))
        gateway.stop.set()
        await idle.wait_closed()
        assert busy.close_code is None
        assert json.loads(await busy.recv())["type"] == "wait_a_second_response"
        await busy.wait_closed()
        assert (idle.close_code, busy.close_code) == (1012, 1012)
