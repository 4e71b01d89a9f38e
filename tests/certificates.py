"""Certificates that the tests make for themselves."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """A certificate for 127.0.0.1, signed by itself, and its key."""

    certificate: Path
    key: Path
    expires: datetime

    @property
    def settings(self) -> dict[str, object]:
        """The configuration that shows it, for both listeners."""
        return {
            "tls__certificate": str(self.certificate),
            "tls__key": str(self.key),
            "server__tls": True,
            "api__tls": True,
        }

    def client(self) -> ssl.SSLContext:
        """A client that trusts nothing else."""
        return ssl.create_default_context(cafile=str(self.certificate))


def make(folder: Path, name: str = "here", days: float = 30, password: bytes = b"") -> Pair:
    """A new pair that expires in so many days, which may be past."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    expires = (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(expires - timedelta(days=365))
        .not_valid_after(expires)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key", expires)
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pair.key.touch(0o600)
    pair.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    return pair
