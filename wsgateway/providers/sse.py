"""Server-sent events: bytes in, the data of events out.

Only this module knows that format (WHATWG HTML, section 9.2.6). It knows neither sockets nor what
the data means. How much it may hold is bounded by whoever feeds it.
"""

from __future__ import annotations

from typing import Final

MARK: Final = b"\xef\xbb\xbf"
"""A byte order mark, which may stand at the beginning."""


class Events:
    """Reads one stream, which may be cut anywhere, also between the bytes of a character."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._after_cr = False
        self._begun = False

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        if self._after_cr and received.startswith(b"\n"):
            received = received[1:]  # CR LF was cut in two
            self._after_cr = False
        if not received:
            return []
        self._after_cr = received.endswith(b"\r")
        first, *rest = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line += first
        events = []
        for following in rest:
            event = self._end_line()
            if event is not None:
                events.append(event)
            self._line += following
        return events

    def _end_line(self) -> bytes | None:
        line = bytes(self._line)
        self._line.clear()
        if not self._begun:
            self._begun = True
            line = line.removeprefix(MARK)
        if not line:
            event = b"\n".join(self._data) if self._data else None
            self._data.clear()
            return event
        name, _, value = line.partition(b":")
        if name == b"data":  # comments and the other fields mean nothing here
            self._data.append(value.removeprefix(b" "))
        return None
