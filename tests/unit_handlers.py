"""Message types that do to a gateway what its unit is to withstand."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from wsgateway.handlers import Device, handler

PR_GET_MDWE = 66


@handler("block")
def block(message: str, device: Device) -> dict[str, Any]:
    """Hold the loop until somebody writes to the pipe of that name."""
    return {"data": {"read": Path(message).read_text()}}


@handler("mdwe")
def mdwe(message: str, device: Device) -> dict[str, Any]:
    """Whether this process may not make memory executable."""
    return {"data": {"refused": ctypes.CDLL(None).prctl(PR_GET_MDWE, 0, 0, 0, 0) & 1}}
