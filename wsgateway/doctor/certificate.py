"""How long a TLS certificate is good for.

Only this module reads certificates: no more than their two dates, which needs no library. It knows
neither sockets nor configuration.
"""

from __future__ import annotations

import re
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from wsgateway.doctor.finding import Finding, failed, passed, warned

WARN_DAYS: Final = 14
"""Days before the end at which a renewal that works by itself has long been made."""

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME: Final = 0x17
_VERSION: Final = 0xA0


def check_file(name: str, path: Path, now: float | None = None) -> Finding:
    """Judge a file of PEM certificates by the one that ends first."""
    try:
        texts = _PEM.findall(path.read_text("ascii"))
        certificates = [ssl.PEM_cert_to_DER_cert(text) for text in texts]
    except OSError as error:
        fix = f"create it, or let this user read it (run as the gateway's user): {path}"
        return failed(name, f"{path} cannot be read: {error.strerror}", fix)
    except ValueError:
        certificates = []
    if not certificates:
        return failed(name, f"{path} holds no certificate in PEM", "name the right file")
    judged = [check(name, certificate, now) for certificate in sorted(certificates, key=_end)]
    order = ("fail", "warn", "pass")
    return min(judged, key=lambda finding: order.index(finding.status))


def check(name: str, der: bytes, now: float | None = None) -> Finding:
    """Judge a certificate by its dates; ``now`` is in seconds since 1970."""
    try:
        begins, ends = validity(der)
    except ValueError:
        return failed(name, "what is there is no certificate", "name the right file")
    now = time.time() if now is None else now
    day = f"{datetime.fromtimestamp(ends, UTC):%Y-%m-%d}"
    if now >= ends:
        fix = "renew the certificate and reload: no client that checks it connects"
        return failed(name, f"the certificate ended on {day}", fix)
    if now < begins:
        fix = "correct the clock, or wait"
        return failed(name, f"the certificate is not valid yet, it ends on {day}", fix)
    days = int((ends - now) / 86400)
    if days < WARN_DAYS:
        fix = "renew the certificate and reload: what renews it has failed"
        return warned(name, f"the certificate ends on {day}, in {days} days", fix)
    return passed(name, f"the certificate ends on {day}, in {days} days")


def validity(der: bytes) -> tuple[float, float]:
    """The first and the last second, since 1970, of a certificate (RFC 5280, section 4.1).

    Raises:
        ValueError: it is none.

    """
    try:
        at = _inside(der, _inside(der, 0))  # Certificate, TBSCertificate
        if der[at] == _VERSION:
            at = _span(der, at)[1]
        for _ in range(3):  # serial number, signature, issuer
            at = _span(der, at)[1]
        at = _inside(der, at)
        begins, at = _time(der, at)
        ends, _ = _time(der, at)
    except IndexError:
        raise ValueError("truncated") from None
    return begins, ends


def _end(der: bytes) -> float:
    try:
        return validity(der)[1]
    except ValueError:
        return 0.0


def _time(der: bytes, at: int) -> tuple[float, int]:
    start, end = _span(der, at)
    text = der[start:end].decode("ascii")
    if der[at] == _UTC_TIME:  # two digits, which mean 1950 to 2049
        text = ("19" if text[:2] >= "50" else "20") + text
    moment = datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    return moment.timestamp(), end


def _inside(der: bytes, at: int) -> int:
    return _span(der, at)[0]


def _span(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the element at a place begins and ends (X.690, section 8.1)."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(der[start : start + size], "big"), start + size
    return start, start + length
