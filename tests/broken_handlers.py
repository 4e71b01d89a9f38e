"""A module whose handler takes too much."""

from __future__ import annotations

from wsgateway.handlers import handler


@handler("broken")
def broken(message: str, device: object, more: object) -> None:
    """Never called."""
