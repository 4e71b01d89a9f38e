"""Which connection is in which group on this instance.

Only this module says who is in a group. It knows neither sockets nor Redis, never awaits and never
logs; callers act on the transitions that it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Set
from typing import Generic, TypeVar

M = TypeVar("M", bound=Hashable)


class Hub(Generic[M]):
    """Groups of members. A group exists while it has a member."""

    def __init__(self) -> None:
        self._groups: dict[str, set[M]] = {}
        self._kinds: Counter[str] = Counter()

    def join(self, group: str, member: M) -> bool:
        """Add a member; True if it is the group's first (0 -> 1). Joining twice changes nothing."""
        members = self._groups.get(group)
        if members is None:
            self._groups[group] = {member}
            self._kinds[_kind(group)] += 1
            return True
        members.add(member)
        return False

    def leave(self, group: str, member: M) -> bool:
        """Remove a member; True if it was the group's last (1 -> 0). Strangers change nothing."""
        members = self._groups.get(group)
        if members is None or member not in members:
            return False
        members.discard(member)
        if members:
            return False
        del self._groups[group]
        self._kinds[_kind(group)] -= 1
        return True

    def members(self, group: str) -> Set[M]:
        """Who is in a group now: a live view, stale as soon as the caller awaits."""
        return self._groups.get(group) or frozenset()

    def groups(self) -> Iterator[str]:
        """The groups that have members now."""
        return iter(self._groups)

    def count(self, kind: str) -> int:
        """How many groups have members whose name begins with that word and an underscore."""
        return self._kinds[kind]

    def __len__(self) -> int:
        """How many groups have members."""
        return len(self._groups)


def _kind(group: str) -> str:
    return group.partition("_")[0]
