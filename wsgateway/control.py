"""What may be asked and done on every instance: who is here, cut them, end a token or a user.

Only this module says which questions instances answer each other. It knows neither HTTP nor SQL
nor Redis commands.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from wsgateway.accounts import Accounts
from wsgateway.cluster import Answer, Answers, Cluster
from wsgateway.roster import Roster
from wsgateway.wire import CloseCode

SECONDS: Final = 1.0
"""How long the instances may take to answer."""

MAX_PAGE: Final = 1000
"""Entries in one answer, about 250 KB."""


MAX_UNHEARD: Final = 1000
"""Revoked tokens that are told again once the others can hear; the oldest is forgotten first."""


class Control:
    """Asks all instances at once, this one too."""

    def __init__(self, cluster: Cluster, roster: Roster, accounts: Accounts) -> None:
        self._cluster = cluster
        self._roster = roster
        self._accounts = accounts
        self._unheard: OrderedDict[str, None] = OrderedDict()
        self._telling: asyncio.Task[None] | None = None
        cluster.on_reunion = self.tell_unheard
        cluster.answer("connections", self._connections)
        cluster.answer("users", self._users)
        cluster.answer("disconnect", self._disconnect)
        cluster.answer("revoke", self._revoke)
        cluster.answer("active", self._set_active)
        cluster.answer("counts", self._counts)

    async def connections(
        self, about: Mapping[str, Any], after: tuple[str, str], limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Connections by instance and id, those after (instance, id), and whether all answered."""
        question = {**about, "after": after, "limit": limit}
        answers = await self._cluster.ask("connections", question, SECONDS)
        found = [row for _, rows in _sorted(answers, "connections") for row in rows]
        return found[:limit], answers.complete

    async def users(self, after: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Connected users by id, those after one, and whether all instances answered."""
        answers = await self._cluster.ask("users", {"after": after, "limit": limit}, SECONDS)
        users: dict[int, dict[str, Any]] = {}
        for _, rows in _sorted(answers, "users"):
            for row in rows:
                known = users.setdefault(row["user_id"], row)
                if known is not row:
                    known["connections"] += row["connections"]
                    known["instances"] += row["instances"]
                    known["connected_at"] = min(known["connected_at"], row["connected_at"])
                    known["last_activity"] = max(known["last_activity"], row["last_activity"])
        return [users[user_id] for user_id in sorted(users)][:limit], answers.complete

    async def disconnect(self, about: Mapping[str, Any], reason: str) -> dict[str, Any]:
        """Close connections with 4003; ``{"cut", "instances", "complete"}``."""
        answers = await self._cluster.ask("disconnect", {**about, "reason": reason}, SECONDS)
        return _cut(answers)

    async def revoke(self, token_hash: str) -> dict[str, Any]:
        """End a token everywhere and its connections with 4001; as `disconnect`."""
        answers = await self._cluster.ask("revoke", {"hash": token_hash}, SECONDS)
        if not answers.complete:
            self._unheard[token_hash] = None
            if len(self._unheard) > MAX_UNHEARD:
                self._unheard.popitem(last=False)
        return _cut(answers)

    def tell_unheard(self) -> None:
        """Tell again of tokens that ended while not every instance could hear it."""
        if self._unheard and (self._telling is None or self._telling.done()):
            self._telling = asyncio.get_running_loop().create_task(self._tell_unheard())

    async def _tell_unheard(self) -> None:
        await asyncio.sleep(SECONDS)  # until it is known who is there
        for token_hash in list(self._unheard):
            if (await self._cluster.ask("revoke", {"hash": token_hash}, SECONDS)).complete:
                self._unheard.pop(token_hash, None)

    async def set_active(self, user_id: int, active: bool) -> dict[str, Any]:
        """Enable or disable a user everywhere; as `disconnect`."""
        about = {"user_id": user_id, "active": active}
        return _cut(await self._cluster.ask("active", about, SECONDS))

    async def counts(self) -> dict[str, Any]:
        """``{instance: {"connections", "users", "devices"}}`` of those that answered."""
        return (await self._cluster.ask("counts", {}, SECONDS)).by_instance

    def counts_here(self) -> dict[str, int]:
        """``{"connections", "users", "devices"}`` of this instance."""
        return self._roster.counts()

    async def _connections(self, about: Mapping[str, Any]) -> Answer:
        instance, after = about["after"]
        name = self._cluster.name
        visitors = [] if name < instance else self._roster.find(**_who(about))
        rows = self._roster.page(
            visitors, after if name == instance else "", min(int(about["limit"]), MAX_PAGE)
        )
        return {"connections": rows}

    async def _users(self, about: Mapping[str, Any]) -> Answer:
        limit = min(int(about["limit"]), MAX_PAGE)
        return {"users": self._roster.users(int(about["after"]), limit)}

    async def _disconnect(self, about: Mapping[str, Any]) -> Answer:
        who = _who(about)
        if not who:
            return {"cut": 0}  # never everybody by mistake
        visitors = self._roster.find(**who)
        reason = str(about.get("reason", "")).encode()[:120].decode(errors="ignore")
        return {"cut": await self._roster.cut(visitors, CloseCode.DISCONNECTED, reason)}

    async def _revoke(self, about: Mapping[str, Any]) -> Answer:
        token_hash = str(about["hash"])
        # Found before the change: whoever else notices it may be quicker to cut them.
        visitors = [one for one in self._roster.find() if one.token_hash == token_hash]
        await self._accounts.revoke(token_hash)
        return {"cut": await self._roster.cut(visitors, CloseCode.TOKEN_ENDED, "revoked")}

    async def _set_active(self, about: Mapping[str, Any]) -> Answer:
        user_id = int(about["user_id"])
        visitors = [] if about["active"] else self._roster.find(user_id=user_id)
        await self._accounts.set_active(user_id, bool(about["active"]))
        return {"cut": await self._roster.cut(visitors, CloseCode.TOKEN_ENDED, "disabled")}

    async def _counts(self, about: Mapping[str, Any]) -> Answer:  # noqa: ARG002
        return dict(self._roster.counts())


def _who(about: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"user_id": int, "device_id": int, "connection_id": str}
    return {key: kind(about[key]) for key, kind in keys.items() if about.get(key) is not None}


def _sorted(answers: Answers, part: str) -> list[tuple[str, list[dict[str, Any]]]]:
    return sorted((name, answer.get(part) or []) for name, answer in answers.by_instance.items())


def _cut(answers: Answers) -> dict[str, Any]:
    instances = {name: int(answer.get("cut", 0)) for name, answer in answers.by_instance.items()}
    return {"cut": sum(instances.values()), "instances": instances, "complete": answers.complete}
