"""Current weather from QWeather.

Only this module knows QWeather's requests and words. A city is looked up, then its weather is asked
for; both generations of the weather call are mapped to one shape. Finished answers are kept for a
while; what the look-up says is not, as QWeather's terms forbid to store it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import unicodedata
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from time import monotonic, time
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from wsgateway import config
from wsgateway.metrics import Metrics
from wsgateway.providers import retry
from wsgateway.providers.breaker import Breaker
from wsgateway.providers.cache import Cache
from wsgateway.providers.failures import Failure, Outcome, Unusable
from wsgateway.providers.flights import Flights
from wsgateway.providers.guard import Guard
from wsgateway.providers.outbound import Answer, Outbound, Patience, Request

log = logging.getLogger(__name__)

SERVICE: Final = "weather service"
MAX_CITY: Final = 64
"""Characters of a city's name; the longest official ones have about 60."""

MAX_ANSWER: Final = 65_536
"""Bytes of an answer; real ones have about one thousand."""

MAX_TEXT: Final = 64
"""Characters of a value that are passed on; real ones have at most ten."""

LIMITED_SECONDS: Final = 60.0
"""How long the service is left alone that gets too many requests and does not say how long."""

CHECKED_CITY: Final = "北京"

FIELDS: Final[tuple[str, ...]] = (
    "obsTime", "temp", "feelsLike", "icon", "text", "wind360", "windDir", "windScale",
    "windSpeed", "humidity", "precip", "pressure", "vis", "cloud", "dew",
)  # fmt: skip
"""What `now` holds in version 7: all texts, some perhaps empty."""

STATUSES: Final = {
    204: Outcome.NOT_FOUND,
    400: Outcome.REJECTED,
    401: Outcome.DENIED,
    402: Outcome.DENIED,
    403: Outcome.DENIED,
    404: Outcome.NOT_FOUND,
    429: Outcome.LIMITED,
}
"""What a status means, in HTTP or in an answer's own ``code``; others from 500 on are the service's
trouble and the rest is nothing we know."""

Text = Annotated[str, msgspec.Meta(max_length=256)]
T = TypeVar("T")


class Place(msgspec.Struct):
    """A city as the look-up tells it."""

    name: Text
    id: Text
    lat: Text
    lon: Text


class Coded(msgspec.Struct):
    """What every answer of the older style has."""

    code: str = "200"


class Problem(msgspec.Struct):
    """What an error of the newer style is about."""

    title: str = ""
    type: str = ""


class Problems(msgspec.Struct):
    """An error of the newer style."""

    error: Problem = msgspec.field(default_factory=Problem)


class Places(msgspec.Struct):
    """The answer of the look-up; the first is the best."""

    location: list[Place] = []


class NowV7(msgspec.Struct):
    """The weather of version 7."""

    now: dict[str, str | None] = {}
    updateTime: Text = ""  # noqa: N815 - as the service spells it


class Value(msgspec.Struct):
    """A number with a unit that is known."""

    value: float | None = None


class Condition(msgspec.Struct):
    """What the weather is, in words and as the number of an icon."""

    text: Text
    code: str | int


class Direction(msgspec.Struct):
    """Where the wind comes from."""

    compass: Text = ""


class Wind(msgspec.Struct):
    """The wind; its speed in m/s."""

    direction: Direction = msgspec.field(default_factory=Direction)
    speed: Value = msgspec.field(default_factory=Value)


class Precipitation(msgspec.Struct):
    """Rain and snow in mm."""

    amount: Value = msgspec.field(default_factory=Value)


class NowV1(msgspec.Struct):
    """The weather of version 1; humidity is a share, visibility in m."""

    condition: Condition
    temperature: Value
    feelsLike: Value = msgspec.field(default_factory=Value)  # noqa: N815
    humidity: float | None = None
    wind: Wind = msgspec.field(default_factory=Wind)
    precipitation: Precipitation = msgspec.field(default_factory=Precipitation)
    pressure: Value = msgspec.field(default_factory=Value)
    visibility: Value = msgspec.field(default_factory=Value)


class Report(msgspec.Struct, frozen=True):
    """A finished answer, as it is kept."""

    city: str
    now: Mapping[str, str]
    updated: str

    def document(self) -> dict[str, Any]:
        """What a device gets; the caller's own."""
        return {
            "city": {"name": self.city},
            "weather": {"now": dict(self.now), "updateTime": self.updated},
        }


class QWeather:
    """The weather of a city, asked for once however many want it."""

    def __init__(self, settings: config.Weather, outbound: Outbound, metrics: Metrics) -> None:
        """Connect to nothing yet. Raises ConfigError for a key that cannot be used."""
        self._settings = settings
        self._outbound = outbound
        self._metrics = metrics
        self._headers = authorization(settings)
        self._cache = Cache[Report](settings.cache_size, settings.cache_ttl)
        self._flights = Flights[Report]()
        self._seats = asyncio.Semaphore(settings.concurrency)
        breaker = Breaker(settings.breaker_failures, settings.breaker_pause)
        self._guard = Guard("qweather", SERVICE, breaker, metrics)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Be ready for requests; on leaving none is under way."""
        async with self._flights.running():
            yield

    async def current(self, city: str) -> dict[str, Any]:
        """The weather of a city now, or as it was at most ``weather.cache_ttl`` ago."""
        city = readable(city)
        key = city.casefold()
        known = self._cache.get(key, monotonic())
        source = "cache" if known else "shared" if key in self._flights else "service"
        self._metrics.weather_answers[source] += 1
        report = known or await self._flights.share(key, lambda: self._report(city, key))
        return report.document()

    async def check(self) -> None:
        """Ask for the weather of one city, past the cache."""
        await self._ask(CHECKED_CITY)

    async def _report(self, city: str, key: str) -> Report:
        report = await self._ask(city)
        self._cache.put(key, report, monotonic())
        return report

    async def _ask(self, city: str) -> Report:
        deadline = monotonic() + self._settings.timeout
        try:
            # No longer than leaves time for a call: else our own queue would look like its fault.
            async with asyncio.timeout(self._settings.timeout - self._settings.call_timeout):
                await self._seats.acquire()
        except TimeoutError:
            raise self._guard.counted(Failure(Outcome.BUSY, SERVICE)) from None
        try:
            place = await self._look_up(city, deadline)
            return await self._weather_of(place, deadline)
        finally:
            self._seats.release()

    async def _look_up(self, city: str, deadline: float) -> Place:
        path = f"/geo/v2/city/lookup?location={quote(city, safe='')}&number=1{self._lang()}"
        return await self._get(path, deadline, read_place)

    async def _weather_of(self, place: Place, deadline: float) -> Report:
        if self._settings.api == "v1":
            spot = "/".join(f"{degrees(text):.2f}" for text in (place.lat, place.lon))
            path = f"/weather/v1/current/{spot}?localTime=true{self._lang()}"
            now = await self._get(path, deadline, read_v1)
            return Report(place.name, now, datetime.now(UTC).isoformat(timespec="minutes"))
        path = f"/v7/weather/now?location={quote(place.id, safe='')}{self._lang()}"
        values, updated = await self._get(path, deadline, read_v7)
        return Report(place.name, values, updated)

    def _lang(self) -> str:
        lang = self._settings.lang
        return f"&lang={quote(lang, safe='')}" if lang else ""

    async def _get(self, path: str, deadline: float, read: Callable[[bytes], T]) -> T:
        """Make one request and read its answer. Raises Failure."""
        settings, left = self._settings, deadline - monotonic()
        total = max(0.0, min(settings.call_timeout, left))
        request = Request(
            service=SERVICE,
            method="GET",
            url=settings.url.rstrip("/") + path,
            headers=self._headers(time()),
            patience=Patience(settings.connect_timeout, total, total),
            most=MAX_ANSWER,
        )
        try:
            with self._guard.request():
                async with self._outbound.ask(request) as answer:
                    return await understood(answer, read)
        except Failure as failure:
            if failure.outcome is Outcome.LIMITED:
                self._guard.rest(failure.wait or LIMITED_SECONDS)
            raise


def authorization(settings: config.Weather) -> Callable[[float], Mapping[str, str]]:
    """Makes the header that proves who asks, at a time of day. Raises ConfigError."""
    if not settings.jwt_key:
        return lambda _: {"X-QW-Api-Key": settings.key}
    from wsgateway.providers.signer import Signer  # needs an extra: only where it is configured

    signer = Signer(settings.jwt_key, settings.jwt_id, settings.jwt_project)
    return lambda wall: {"Authorization": f"Bearer {signer.token(wall)}"}


def readable(city: str) -> str:
    """A city's name as it is asked for, with single spaces.

    Raises:
        Unusable: no city is called so; in words for the device.

    """
    if len(city) > MAX_CITY:
        raise Unusable(f"the name of the city is longer than {MAX_CITY} characters")
    if any(unicodedata.category(character)[0] == "C" for character in city):
        raise Unusable("the name of the city holds control characters")
    name = " ".join(unicodedata.normalize("NFKC", city).split())
    if not name:
        raise Unusable("the name of the city is empty")
    if re.fullmatch(r"[\x00-\x7f]", name) or len(name) > MAX_CITY:
        raise Unusable("the name of the city is too short or too long")
    return name


async def understood(answer: Answer, read: Callable[[bytes], T]) -> T:
    """What an answer says. Raises Failure for an error in either of the service's two styles."""
    status = answer.status
    if status == 400 and is_no_such_place(await answer.body()):
        status = 404
    if status != 200:
        raise _failure(status, answer.headers)
    if "json" not in answer.kind:
        raise Failure(Outcome.GARBAGE, SERVICE)
    body = await answer.body()
    try:
        code = msgspec.json.decode(body, type=Coded).code
        if code != "200":
            raise _failure(int(code), answer.headers)
        return read(body)
    except (ValueError, RecursionError, OverflowError):  # msgspec's and Unicode's are ValueErrors
        raise Failure(Outcome.GARBAGE, SERVICE) from None


def is_no_such_place(body: bytes) -> bool:
    """Whether an error of the newer style is about the city and not about the request."""
    try:
        problem = msgspec.json.decode(body, type=Problems).error
    except (ValueError, RecursionError):
        return False
    words = re.sub("[^a-z]+", " ", f"{problem.title} {problem.type}".lower())
    return "no such location" in words


def read_place(body: bytes) -> Place:
    """The best place of a look-up. Raises Failure if there is none."""
    places = msgspec.json.decode(body, type=Places)
    if not places.location:
        raise Failure(Outcome.NOT_FOUND, SERVICE)
    return places.location[0]


def read_v7(body: bytes) -> tuple[Mapping[str, str], str]:
    """The values of version 7, and when they were updated."""
    report = msgspec.json.decode(body, type=NowV7)
    now = {name: (report.now[name] or "")[:MAX_TEXT] for name in FIELDS if name in report.now}
    if not now.get("temp") or "text" not in now:
        raise ValueError("no weather")
    return now, report.updateTime


def read_v1(body: bytes) -> Mapping[str, str]:
    """The values of version 1 as version 7 words them: texts, km/h, km and per cent."""
    report = msgspec.json.decode(body, type=NowV1)
    if report.temperature.value is None:
        raise ValueError("no weather")
    speed, seen = report.wind.speed.value, report.visibility.value
    now = {
        "temp": _rounded(report.temperature.value),
        "feelsLike": _rounded(report.feelsLike.value),
        "icon": str(report.condition.code)[:MAX_TEXT],
        "text": report.condition.text[:MAX_TEXT],
        "windDir": report.wind.direction.compass[:MAX_TEXT],
        "windSpeed": _rounded(speed, 3.6),
        "humidity": _rounded(report.humidity, 100),
        "precip": _tenths(report.precipitation.amount.value),
        "pressure": _rounded(report.pressure.value),
        "vis": _rounded(seen, 0.001),
    }
    return {name: text for name, text in now.items() if text}


def degrees(text: str) -> float:
    """A latitude or longitude. Raises Failure."""
    try:
        number = float(text)
    except ValueError:
        number = 999.0
    if not -180 <= number <= 180:
        raise Failure(Outcome.GARBAGE, SERVICE)
    return number


def _rounded(number: float | None, factor: float = 1) -> str:
    return "" if number is None else str(round(number * factor))


def _tenths(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def _failure(status: int, headers: Mapping[str, str]) -> Failure:
    unknown = Outcome.UNAVAILABLE if status >= 500 else Outcome.GARBAGE
    outcome = STATUSES.get(status, unknown)
    if outcome is not Outcome.NOT_FOUND:
        log.warning("qweather answered status=%s", status)
    wait = retry.told(headers, time()) if outcome is Outcome.LIMITED else None
    return Failure(outcome, SERVICE, wait=wait)
