"""The certificate that this instance shows, and the context that shows it.

Only this module reads certificates and keys. It knows neither sockets nor who connects.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from wsgateway.config import Config
from wsgateway.errors import ConfigError
from wsgateway.metrics import Metrics

log = logging.getLogger(__name__)

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"

_VERSION, _UTC_TIME = 0xA0, 0x17
_FIELDS_BEFORE_VALIDITY = 3
"""Serial number, signature and issuer (RFC 5280, section 4.1)."""


class Shown(NamedTuple):
    """A context with a certificate, and when that expires, in seconds since 1970."""

    context: ssl.SSLContext
    expires_at: float


class Tls:
    """What new connections are encrypted with. It can be replaced while they come in."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        """Raises ConfigError, as `prepare`."""
        self._metrics = metrics
        self._use(_read(config))

    @property
    def context(self) -> ssl.SSLContext:
        """The context for new connections."""
        return self._shown.context

    @property
    def expires_at(self) -> float:
        """When the certificate expires, in seconds since 1970."""
        return self._shown.expires_at

    def prepare(self, _: Config, wanted: Config) -> Callable[[], Awaitable[None]]:
        """Read certificate and key, also where their names are the same; what then uses them.

        May be called in a thread. A certificate that has expired is used all the same, with a
        warning: some devices do not look, and the others are told what is wrong.

        Raises:
            ConfigError: one line with the file and the reason.

        """
        shown = _read(wanted)

        async def use() -> None:
            self._use(shown)

        return use

    def _use(self, shown: Shown) -> None:
        self._shown = shown
        self._metrics.tls_certificate_expires = shown.expires_at


def _read(config: Config) -> Shown:
    certificate, key = config.tls_files()
    # A context of its own, and not the one in use: a pair that does not match breaks it.
    context = _context(certificate, key)
    context.minimum_version = VERSIONS[config.tls.minimum_version]
    expires = expires_at(certificate)
    if expires <= time.time():
        day = datetime.fromtimestamp(expires, UTC).date()
        log.warning(
            "tls.certificate = %s expired on %s: clients that look will not connect; renew it",
            certificate, day,
        )  # fmt: skip
    if key.stat().st_mode & 0o004:
        log.warning("%s holds a private key and everybody may read it: chmod 600 %s", key, key)
    return Shown(context, expires)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    _look_for(certificate, BEGIN, "tls.certificate", "certificate")
    _look_for(key, "PRIVATE KEY-----", "tls.key", "private key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION  # costs the server more than the client
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")  # or it would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls.key = {key}: is not the key of {certificate}") from None
        if "ENCRYPTED" in key.read_text("ascii", errors="replace"):
            raise ConfigError(
                f"tls.key = {key}: is encrypted: write it without a passphrase "
                "(openssl pkey -in KEY -out NEW)"
            ) from None
        why = (error.reason or "damaged").lower().replace("_", " ")
        raise ConfigError(f"tls.certificate = {certificate}, tls.key = {key}: {why}") from None
    return context


def _look_for(path: Path, mark: str, name: str, what: str) -> None:
    try:
        found = mark in path.read_text("ascii", errors="replace")
    except OSError as error:
        raise ConfigError(f"{name} = {path}: cannot be read: {error.strerror}") from None
    if not found:
        raise ConfigError(f"{name} = {path}: holds no {what} in PEM")


def expires_at(certificate: Path) -> float:
    """When the first certificate of a file expires, in seconds since 1970.

    To be called for files that could be loaded: it does not look for what is wrong with others.
    """
    _, _, text = certificate.read_text("ascii", errors="replace").partition(BEGIN)
    data = ssl.PEM_cert_to_DER_cert(BEGIN + text.partition(END)[0] + END)
    _, position, _ = _element(data, 0)  # Certificate
    _, position, _ = _element(data, position)  # TBSCertificate
    tag, _, after = _element(data, position)
    if tag == _VERSION:
        position = after
    for _ in range(_FIELDS_BEFORE_VALIDITY):
        _, _, position = _element(data, position)
    _, position, _ = _element(data, position)  # Validity
    _, _, position = _element(data, position)  # notBefore
    tag, start, stop = _element(data, position)
    text = data[start:stop].decode("ascii")
    if tag == _UTC_TIME:  # two digits of the year, of 1950 to 2049 (section 4.1.2.5.1)
        text = ("19" if text >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _element(data: bytes, position: int) -> tuple[int, int, int]:
    """The tag of the element at a position, and where its content begins and ends (X.690, DER)."""
    tag, length, start = data[position], data[position + 1], position + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[start : start + size], "big")
        start += size
    return tag, start, start + length
