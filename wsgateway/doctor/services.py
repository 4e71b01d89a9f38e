"""The services that handlers ask, each asked once.

Only this module knows how they are asked by a person.
"""

from __future__ import annotations

import asyncio

from wsgateway import config
from wsgateway.doctor.finding import Finding, failed, passed, skipped
from wsgateway.errors import ServiceError
from wsgateway.providers import Chat, Services, Weather

WITHOUT_SERVICE = ("sample", "echo")


async def check(settings: config.Config, services: Services, seconds: float) -> list[Finding]:
    """Make one real request to each service."""
    async with services.running():
        return list(
            await asyncio.gather(
                _one("weather", settings.weather.provider, services.weather, seconds),
                _one("chat", settings.chat.provider, services.chat, seconds),
            )
        )


async def _one(section: str, provider: str, service: Weather | Chat, seconds: float) -> Finding:
    if provider in WITHOUT_SERVICE:
        return skipped(section, f"'{provider}' asks no service")
    try:
        async with asyncio.timeout(seconds):
            await service.check()
    except ServiceError as error:
        fix = f"check {section}.url and {section}.key, and the service's own status page"
        return failed(section, f"'{provider}': {error}", fix)
    except TimeoutError:
        fix = f"check {section}.url and the way there (firewall, proxy), or try --timeout"
        return failed(section, f"'{provider}' gives no answer within {seconds:g} s", fix)
    return passed(section, f"'{provider}' answers")
