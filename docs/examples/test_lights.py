"""The example answers as its page says."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.conftest import Accounts, accounts, ask, running_gateway  # noqa: F401


@pytest.fixture
def lights(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The configuration that adds the example, as an installed module would be."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return {"handlers__modules": "lights"}


async def test_a_switch_turns_the_lights_of_its_user_on(
    accounts: Accounts, lights: dict[str, str]
) -> None:
    async with (
        running_gateway(accounts, **lights) as gateway,
        gateway.device() as lamp,
        gateway.device() as switch,
    ):
        answer = await ask(switch, {"type": "light", "message": {"on": True}})
        assert answer["type"] == "light_response"
        assert answer["data"] == {"on": True, "brightness": 100}
        assert orjson.loads(await lamp.recv()) == {"type": "light", "on": True}
        assert orjson.loads(await switch.recv()) == {"type": "light", "on": True}


async def test_a_wrong_field_is_named(accounts: Accounts, lights: dict[str, str]) -> None:
    async with running_gateway(accounts, **lights) as gateway, gateway.device() as switch:
        answer = await ask(switch, {"type": "light", "message": {"on": True, "brightness": 101}})
        assert answer["code"] == "VALIDATION_ERROR"
        assert "message.brightness" in answer["message"]
        answer = await ask(switch, {"type": "light"})
        assert answer["code"] == "VALIDATION_ERROR"


async def test_a_schedule_that_cannot_be_had_says_why(
    accounts: Accounts, lights: dict[str, str]
) -> None:
    async with running_gateway(accounts, **lights) as gateway, gateway.device() as switch:
        answer = await ask(switch, {"type": "light_schedule", "message": "sunset"})
        assert answer["data"] == {"schedule": "sunset", "sky": "晴"}
        answer = await ask(switch, {"type": "light_schedule", "message": "never"})
        assert (answer["code"], answer["message"]) == ("SERVICE_ERROR", "Unknown schedule: never")
