"""Why a service gave no answer: a word for the metric and the log, a sentence for the device.

Only this module words what a device hears of a service's failure. Nothing that a service sent is
ever in it: such texts can repeat a key.
"""

from __future__ import annotations

import enum
import math
from typing import Final

from wsgateway.errors import ServiceError


class Outcome(enum.StrEnum):
    """What became of a request to a service; the label of its metric."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    TOO_LARGE = "too_large"
    GARBAGE = "garbage"
    UNAVAILABLE = "unavailable"
    LIMITED = "limited"
    DENIED = "denied"
    REJECTED = "rejected"
    NOT_FOUND = "not_found"
    DECLINED = "declined"
    EMPTY = "empty"
    INVALID = "invalid"
    BUSY = "busy"
    PAUSED = "paused"
    CANCELLED = "cancelled"


SENTENCES: Final = {
    Outcome.UNREACHABLE: "the {} cannot be reached",
    Outcome.TIMEOUT: "the {} did not answer in time",
    Outcome.BROKEN: "the connection to the {} broke",
    Outcome.TOO_LARGE: "the answer of the {} is too large",
    Outcome.GARBAGE: "the {} answered something that cannot be understood",
    Outcome.UNAVAILABLE: "the {} failed",
    Outcome.LIMITED: "the {} gets too many requests",
    Outcome.DENIED: "the {} does not accept this gateway's key or plan",
    Outcome.REJECTED: "the {} does not accept the request",
    Outcome.NOT_FOUND: "the {} knows no such city",
    Outcome.DECLINED: "the {} declines to answer this",
    Outcome.EMPTY: "the {} answered nothing",
    Outcome.BUSY: "too many others are asking the {}",
    Outcome.PAUSED: "the {} failed and is left alone for a while",
}


class Failure(ServiceError):
    """A service gave no answer.

    ``wait`` is in how many seconds another try makes sense, None if nobody said. ``retry`` says
    whether the same request may be sent again. ``detail`` is for the log alone.
    """

    def __init__(
        self,
        outcome: Outcome,
        service: str,
        *,
        wait: float | None = None,
        retry: bool = False,
        detail: object = "",
    ) -> None:
        text = SENTENCES[outcome].format(service)
        super().__init__(f"{text}: try again in {math.ceil(wait)} s" if wait else text)
        self.outcome = outcome
        self.wait = wait
        self.retry = retry
        self.detail = detail


class Unusable(ServiceError):
    """What a device asks is nothing that a service could be asked; no request is made."""
