"""The process that serves a port on this host, as /proc shows it.

Only this module reads /proc. What it may not see, or what is on another host, it does not find.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LISTENING = "0A"


class Process(NamedTuple):
    """A process; ``descriptors`` is the limit that it runs under."""

    pid: int
    uid: int
    descriptors: int


def serving(port: int) -> list[Process]:
    """The gateways that listen on a TCP port. Takes some milliseconds per thousand connections."""
    wanted = {f"socket:[{inode}]" for inode in _sockets(port)}
    found = []
    for entry in Path("/proc").iterdir() if wanted else ():
        if entry.name.isdecimal() and _is_ours(entry) and _holds(entry, wanted):
            with contextlib.suppress(OSError, TypeError, ValueError):
                found.append(_read(entry))
    return found


def _sockets(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text("ascii").splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENING and int(words[1].rpartition(":")[2], 16) == port:
                    yield words[9]


def _is_ours(process: Path) -> bool:
    """Whether it is a gateway: the first process, say, holds sockets that it opens for others."""
    with contextlib.suppress(OSError):
        return b"wsgateway" in (process / "cmdline").read_bytes()
    return False


def _holds(process: Path, wanted: set[str]) -> bool:
    with contextlib.suppress(OSError), os.scandir(process / "fd") as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                if str(Path(descriptor.path).readlink()) in wanted:
                    return True
    return False


def _read(process: Path) -> Process:
    status, limits = (process / "status").read_text(), (process / "limits").read_text()
    uid = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    descriptors = re.search(r"^Max open files\s+(\d+)", limits, re.MULTILINE)
    assert uid is not None
    assert descriptors is not None
    return Process(int(process.name), int(uid[1]), int(descriptors[1]))
