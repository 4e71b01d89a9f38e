"""When a request is sent again: the policy of the services' own libraries.

Only this module decides that. It knows neither clocks nor loops.
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from typing import Final

RETRIES: Final = 2
"""Tries after the first, as OpenAI's own library makes."""

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 8.0
"""Seconds before the first retry, doubled for each further one up to the longest."""

JITTER: Final = 0.25
"""Share that a pause is shortened by at random, so that many do not come back at one moment."""

LONGEST_TOLD: Final = 120.0
"""Seconds that a service may ask us to wait; more is taken for a mistake and ignored."""

WORTH_IT: Final = frozenset({408, 409, 429})
"""Statuses below 500 that pass by themselves."""


def worth_it(status: int, headers: Mapping[str, str]) -> bool:
    """Whether the same request may succeed later; the service's own word counts first."""
    told = headers.get("x-should-retry")
    if told in ("true", "false"):
        return told == "true"
    return status in WORTH_IT or status >= 500


def told(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds that a service asks us to wait; None if it does not, or says nothing sensible.

    ``wall`` is the time of day in seconds since 1970, as the header may hold a date.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    seconds = milliseconds / 1000 if milliseconds is not None else None
    text = headers.get("retry-after")
    if seconds is None and text is not None:
        seconds = _number(text)
        if seconds is None:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - wall
            except (ValueError, OverflowError):
                return None
    return seconds if seconds is not None and 0 < seconds <= LONGEST_TOLD else None


def pause(attempt: int, asked: float | None, chance: float) -> float:
    """Seconds before retry number ``attempt`` (from 0); ``chance`` is drawn from 0 to 1."""
    if asked is not None:
        return asked
    return min(FIRST_PAUSE * 2.0**attempt, LONGEST_PAUSE) * (1 - JITTER * chance)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
