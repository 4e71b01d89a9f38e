"""permessage-deflate (RFC 7692), always without context takeover.

Only this module compresses, and says what is agreed on with a device that offers it. Nothing is
kept from one message to the next, so that an idle connection holds no memory for it, and a group's
message is compressed once for all members with one window size. It knows neither sockets nor loops.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Final

from websockets.datastructures import Headers
from websockets.exceptions import ProtocolError
from websockets.extensions.permessage_deflate import (
    PerMessageDeflate,
    ServerPerMessageDeflateFactory,
)
from websockets.frames import Frame
from websockets.server import ServerProtocol

from wsgateway import wire
from wsgateway.config import Compression
from wsgateway.metrics import Metrics
from wsgateway.wire import Framing

LARGEST_WINDOW: Final = 15

MEMORY_LEVEL: Final = 5
"""zlib's memLevel: 32 KiB while a message is compressed, at a window of 12 bits. To clear the
256 KiB of zlib's defaults takes five times as long as to compress a short message."""

NOTHING_AGREED: Final = ("", 0)

USUAL_OFFERS: Final = ("permessage-deflate; client_max_window_bits", "permessage-deflate")
"""What Chromium and most libraries offer, and what Firefox and Safari do."""

TAIL_BYTES: Final = 4
"""The end of a flushed block, which every message has and none sends (RFC 7692, 7.2.1)."""

AFTER_FINAL_BYTES: Final = 8
"""Bytes that may follow a final block in an unfinished message; one is usual (RFC 7692, 7.2.3.4)."""


class Inflate(PerMessageDeflate):
    """The library's extension as a core needs it to read, whatever window was agreed on: the
    largest, which lives as long as one message, reads what was written with any."""

    def __init__(self) -> None:
        super().__init__(
            remote_no_context_takeover=True,
            local_no_context_takeover=True,
            remote_max_window_bits=LARGEST_WINDOW,
            local_max_window_bits=LARGEST_WINDOW,
        )

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        """As the library, with one more bound: zlib collects what follows a final block, without
        adding to the message whose size is limited."""
        decoded = super().decode(frame, max_size=max_size)
        unfinished = self.decode_cont_data and not frame.fin
        if unfinished and len(self.decoder.unused_data) > AFTER_FINAL_BYTES:
            raise ProtocolError("data after the final block")
        return decoded


class Deflate:
    """What is agreed on with devices, and how messages to them become frames.

    ``factory`` is for cores that judge an offer. ``usual`` maps the usual offers, and None, to the
    header line of the answer and the window size agreed on, in bits. ``framings`` has, for each
    window size, what makes a frame of a message: one and the same object for all connections with
    that size.
    """

    def __init__(self, settings: Compression, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        window = settings.window_bits
        self.factory = ServerPerMessageDeflateFactory(
            server_no_context_takeover=True,
            client_no_context_takeover=True,
            server_max_window_bits=window if window < LARGEST_WINDOW else None,
        )
        self.usual: Mapping[str | None, tuple[str, int]] = {
            None: NOTHING_AGREED,
            **{offer: self._answer(offer) for offer in USUAL_OFFERS},
        }
        self.framings: Mapping[int, Framing] = {
            bits: partial(self._frame, bits) for bits in range(9, LARGEST_WINDOW + 1)
        }

    def _answer(self, offer: str) -> tuple[str, int]:
        core = ServerProtocol(extensions=[self.factory])
        headers = Headers([("Sec-WebSocket-Extensions", offer)])
        answer, core.extensions = core.process_extensions(headers)
        return f"Sec-WebSocket-Extensions: {answer}\r\n", agreed_window(core)

    def _frame(self, bits: int, payload: bytes) -> bytes:
        """A message's frame, compressed where that makes it shorter."""
        settings, metrics = self._settings, self._metrics
        if len(payload) < settings.min_bytes:
            return wire.text_frame(payload)
        compressor = zlib.compressobj(settings.level, zlib.DEFLATED, -bits, MEMORY_LEVEL)
        data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        if len(data) - TAIL_BYTES >= len(payload):
            return wire.text_frame(payload)
        metrics.compression_input_bytes += len(payload)
        metrics.compression_output_bytes += len(data) - TAIL_BYTES
        return wire.compressed_frame(data[:-TAIL_BYTES])


def agreed_window(core: ServerProtocol) -> int:
    """The window size, in bits, that a handshake agreed on for our messages; 0 if none."""
    return next(
        (
            each.local_max_window_bits
            for each in core.extensions
            if isinstance(each, PerMessageDeflate)
        ),
        0,
    )
