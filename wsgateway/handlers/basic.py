"""The types that need nobody else: ping, sing, dance."""

from __future__ import annotations

from typing import Any

import msgspec

from wsgateway.handlers import handler


class Sing(msgspec.Struct):
    song: str = ""
    artist: str = ""


class Dance(msgspec.Struct):
    dance: str = ""
    style: str = ""
    duration: str = "30秒"


@handler("ping")
def ping() -> dict[str, Any]:
    return {"type": "pong"}


@handler("sing")
def sing(message: Sing) -> dict[str, Any]:
    return {
        "type": "sing_response",
        "data": {"song": message.song, "artist": message.artist, "action": "start_singing"},
        "message": f"开始播放:{message.song} - {message.artist}",
    }


@handler("dance")
def dance(message: Dance) -> dict[str, Any]:
    return {
        "type": "dance_response",
        "data": {
            "dance": message.dance,
            "style": message.style,
            "duration": message.duration,
            "action": "start_dancing",
        },
        "message": f"开始跳舞:{message.dance} ({message.style})",
    }
