"""The chat provider that works without a key: it repeats what it hears."""

from __future__ import annotations

from collections.abc import Callable

from wsgateway.providers.history import History


class EchoChat:
    """Answers with the sentence that the fleet's first backend answered with."""

    async def reply(
        self,
        text: str,
        *,
        user_id: int,  # noqa: ARG002 - the port's words
        history: History,  # noqa: ARG002
        delta: Callable[[str], object] | None = None,  # noqa: ARG002
    ) -> str:
        return f"收到消息:{text}"

    async def check(self) -> None:
        """Nothing can be wrong with it."""
