"""What a check found, in words for a person who is to mend it.

Only this module says how findings look. It knows nothing of what is checked.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["pass", "warn", "fail", "skipped"]


class Finding(NamedTuple):
    """One line: what was seen, and what to do about it.

    'fail' keeps devices or messages away, now or at the next start; 'warn' will one day; 'skipped'
    could not be checked, and ``what`` says why.
    """

    name: str
    status: Status
    what: str
    fix: str = ""


def passed(name: str, what: str) -> Finding:
    return Finding(name, "pass", what)


def warned(name: str, what: str, fix: str) -> Finding:
    return Finding(name, "warn", what, fix)


def failed(name: str, what: str, fix: str) -> Finding:
    return Finding(name, "fail", what, fix)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, "skipped", why)
