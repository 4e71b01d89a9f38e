"""What a user and the chat said to each other on one connection.

Only this module decides what is remembered of a conversation. It knows no service.
"""

from __future__ import annotations

from collections import deque


class History:
    """The last exchanges of a conversation, oldest first.

    Holds at most the ``turns`` exchanges and the ``size`` bytes (UTF-8) that `add` was last told;
    whole exchanges are forgotten, so that it always begins with what the user said.
    """

    __slots__ = ("_bytes", "_turns")

    def __init__(self) -> None:
        self._turns: deque[tuple[str, str]] = deque()
        self._bytes = 0

    def add(self, question: str, answer: str, *, turns: int, size: int) -> None:
        """Remember an exchange, and forget the oldest ones that do not fit any more."""
        self._turns.append((question, answer))
        self._bytes += _size(question, answer)
        while self._turns and (len(self._turns) > turns or self._bytes > size):
            self._bytes -= _size(*self._turns.popleft())

    def turns(self) -> list[tuple[str, str]]:
        """What was said and answered, oldest first."""
        return list(self._turns)

    @property
    def bytes(self) -> int:
        """How much is remembered, in bytes of UTF-8."""
        return self._bytes


def _size(question: str, answer: str) -> int:
    return len(question.encode()) + len(answer.encode())
