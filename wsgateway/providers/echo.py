"""The chat provider that works without a key: it repeats what it hears."""

from __future__ import annotations


class EchoChat:
    """Answers with the sentence that the fleet's first backend answered with."""

    async def reply(self, text: str, *, user_id: int) -> str:  # noqa: ARG002 - the port's words
        return f"收到消息:{text}"
