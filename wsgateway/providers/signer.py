"""Short-lived signatures in place of a key: JWT with Ed25519 (RFC 7519, RFC 8037).

Only this module imports cryptography, and is imported only where such a key is configured. It knows
no clock: the time is passed in, in seconds since 1970.
"""

from __future__ import annotations

import base64
import json
from typing import Final

from wsgateway.errors import ConfigError

try:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
except ImportError:
    raise ConfigError(
        "weather.jwt_key needs the package cryptography: pip install 'wsgateway[crypto]'"
    ) from None

LIFE: Final = 900
"""Seconds that a token lasts; a day is the most that QWeather takes, and less can be stolen."""

RENEW: Final = 60
"""Seconds before its end that a token is replaced, so that none ends on its way."""

PAST: Final = 30
"""Seconds that a token's beginning lies in the past, for clocks that go wrong."""


class Signer:
    """Makes the tokens of one credential."""

    def __init__(self, pem: str, key_id: str, project: str) -> None:
        """Read the private key. Raises ConfigError, without the key."""
        try:
            key = load_pem_private_key(pem.encode(), password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(
                "weather.jwt_key: no Ed25519 private key in PEM without a password; "
                "make one with: openssl genpkey -algorithm ED25519"
            )
        self._key = key
        self._header = _part({"alg": "EdDSA", "kid": key_id})
        self._project = project
        self._token = ""
        self._renew_at = 0.0

    def token(self, wall: float) -> str:
        """A token that is valid now and for a while."""
        if wall >= self._renew_at or wall < self._renew_at - LIFE:  # or the clock was set back
            begin = int(wall) - PAST
            payload = _part({"sub": self._project, "iat": begin, "exp": begin + LIFE})
            signature = self._key.sign(f"{self._header}.{payload}".encode())
            self._token = f"{self._header}.{payload}.{_encode(signature)}"
            self._renew_at = begin + LIFE - RENEW
        return self._token


def _part(document: dict[str, object]) -> str:
    return _encode(json.dumps(document, separators=(",", ":")).encode())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
