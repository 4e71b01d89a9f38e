"""Who is behind a proxy: trusted networks, X-Forwarded-For, the header of the PROXY protocol.

Only this module knows how proxies tell whom they speak for. It runs without sockets or a loop, and
believes nobody but the proxies that the configuration names.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple

TEXT_BYTES = 107
"""Longest header of version 1, with the end of its line (PROXY protocol, section 2.1)."""

BINARY_BYTES = 536
"""Longest header of version 2 that is read: what fits into one segment of any network (section 2);
addresses take 52 bytes at most, or 232 of a Unix socket, the rest are extensions."""

_TEXT = b"PROXY "
_BINARY = b"\r\n\r\n\x00\r\nQUIT\n"
_KINDS: dict[str, type[IPv4Address] | type[IPv6Address]]
_KINDS = {"TCP4": IPv4Address, "TCP6": IPv6Address}
_FIXED = 16
_LOCAL, _PROXY = 0x20, 0x21
_SOURCES = {0: (0, 0), 1: (4, 12), 2: (16, 36), 3: (0, 216)}
"""Bytes of the source and of all addresses, by family: unspecified, IPv4, IPv6, Unix."""


class InvalidHeader(Exception):
    """Bytes that no header of the PROXY protocol begins with."""


class Header(NamedTuple):
    """A header of ``length`` bytes; ``address`` is whom the proxy speaks for.

    It is empty where that is the proxy itself (LOCAL), unknown, or a Unix socket.
    """

    length: int
    address: str


def parse(data: bytes) -> Header | None:
    """Read the header that a connection begins with (PROXY protocol, versions 1 and 2).

    Returns:
        None if ``data`` is only a part of a header: all of it then belongs to the header.

    Raises:
        InvalidHeader: more bytes could not make it one, or it is longer than is read.

    """
    if data[: len(_BINARY)] == _BINARY[: len(data)]:
        return _parse_binary(data)
    if data[: len(_TEXT)] == _TEXT[: len(data)]:
        return _parse_text(data)
    raise InvalidHeader


def _parse_text(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, TEXT_BYTES)
    if end < 0:
        if len(data) >= TEXT_BYTES:
            raise InvalidHeader
        return None
    try:
        _, protocol, *rest = data[:end].decode("ascii").split(" ")
        if protocol == "UNKNOWN":
            return Header(end + 2, "")
        source, target, *ports = rest
        kind = _KINDS[protocol]
        kind(target)
        if len(ports) != 2 or not all(_is_port(port) for port in ports) or "%" in source:
            raise InvalidHeader
        return Header(end + 2, _plain(kind(source)))
    except (ValueError, KeyError):
        raise InvalidHeader from None


def _is_port(text: str) -> bool:
    return text.isdecimal() and int(text) < 65536


def _parse_binary(data: bytes) -> Header | None:
    if len(data) < _FIXED:
        return None
    command, kind, length = data[12], data[13], int.from_bytes(data[14:16], "big")
    family, transport = kind >> 4, kind & 15
    if command not in (_LOCAL, _PROXY) or length > BINARY_BYTES - _FIXED:
        raise InvalidHeader
    if command == _PROXY and (transport > 2 or length < _SOURCES.get(family, (0, 65536))[1]):
        raise InvalidHeader
    if len(data) < _FIXED + length:
        return None
    size = _SOURCES[family][0] if command == _PROXY else 0
    if not size:
        return Header(_FIXED + length, "")
    source = _KINDS["TCP4" if size == 4 else "TCP6"](data[_FIXED : _FIXED + size])
    return Header(_FIXED + length, _plain(source))


class Networks:
    """The networks whose proxies are believed."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises ValueError for what is no network."""
        self._networks = [ip_network(network) for network in networks]

    def trusts(self, address: str) -> bool:
        """Whether a proxy at this address is believed."""
        found = _address(address)
        return found is not None and self._holds(found)

    def client(self, peer: str, forwarded: str) -> str:
        """Whom a peer speaks for, from its ``X-Forwarded-For``, joined with commas.

        That is the last address that none of our proxies has: each adds its own client on the
        right, and whatever stands further left may be forged. The peer itself where it is no
        proxy of ours or does not say.
        """
        client, found = peer, _address(peer)
        words = forwarded.split(",")
        while found is not None and self._holds(found) and words:
            found = _address(words.pop())
            if found is not None:
                client = str(found)
        return client

    def _holds(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address, also with a port; that of IPv4 where it is written as one of IPv6."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _plain(address: IPv4Address | IPv6Address) -> str:
    """An address as it is logged: one client is not to have two."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)
