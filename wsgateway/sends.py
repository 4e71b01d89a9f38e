"""A message to a group over all instances, and the receipt for it.

Only this module knows what a receipt is made of. It knows neither sockets nor Redis commands.
Local members come first and never wait for Redis; then the message goes to the other instances,
and those that listen to the group answer what became of it there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, NamedTuple

from wsgateway import envelope
from wsgateway.cluster import Cluster
from wsgateway.envelope import Envelope, Fate, Published
from wsgateway.errors import Conflict
from wsgateway.fanout import Delivery
from wsgateway.gateway import ALL, Gateway, Mirror, users_in
from wsgateway.ledger import Seen
from wsgateway.metrics import Metrics

KEYED: Final = (100_000, 300.0)
"""Ids of messages that callers may repeat: how many are remembered, about 30 MB, and seconds."""

ITEMS: Final = (10_000, 60.0)
"""Ids of the queue's items, which are repeated within seconds."""

RECENT: Final = (20_000, 60.0)
"""Ids of other messages: their numbers say as much, unless somebody repeats them."""


CONFLICT: Final = "this Idempotency-Key was used with another body"


class Share(NamedTuple):
    """What became of a message on one instance.

    ``users`` are told of broadcasts only. ``conflict`` says that its id came before with other
    content, and that nobody got this one.
    """

    matched: int
    written: int
    dropped: int
    users: tuple[int, ...] = ()
    conflict: bool = False


class _Sighting(NamedTuple):
    """A message whose id was seen: the fingerprint of what it said, and what became of it."""

    fingerprint: str
    delivery: Delivery


@dataclass(slots=True)
class Receipt:
    """What became of a message over all instances, as far as they answered in time.

    ``fate`` says whether the other instances can have got it; None where there is no mirror.
    """

    id: str
    shares: dict[str, Share] = field(default_factory=dict)
    complete: bool = True
    fate: Fate | None = None

    @property
    def matched(self) -> int:
        return sum(share.matched for share in self.shares.values())

    def document(self) -> dict[str, Any]:
        """``{"id", "matched", "written", "dropped", "instances", "complete", "online"}``."""
        shares = self.shares.values()
        return {
            "id": self.id,
            "matched": self.matched,
            "written": sum(share.written for share in shares),
            "dropped": sum(share.dropped for share in shares),
            "instances": {name: share.matched for name, share in self.shares.items()},
            "complete": self.complete,
            "online": self.matched > 0,
        }

    def users(self) -> int:
        """Distinct users that a broadcast matched."""
        return len({user for share in self.shares.values() for user in share.users})


class _Expected:
    """The answers that a sender waits for."""

    __slots__ = ("answered", "missing", "shares")

    def __init__(self) -> None:
        self.shares: dict[str, Share] = {}
        self.missing: set[str] | None = None  # None until Redis has said who listens
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self) -> None:
        done = self.missing is not None and self.missing <= self.shares.keys()
        if done and not self.answered.done():
            self.answered.set_result(None)


class Sends:
    """Sends to groups everywhere, and answers for what came from elsewhere."""

    def __init__(
        self, gateway: Gateway, cluster: Cluster, mirror: Mirror | None, metrics: Metrics
    ) -> None:
        self._gateway = gateway
        self._cluster = cluster
        self._mirror = mirror
        self._metrics = metrics
        self._recent: Seen[_Sighting] = Seen(*RECENT)
        self._repeatable: dict[str, Seen[_Sighting]] = {
            envelope.KEYED: Seen(*KEYED),
            envelope.ITEM: Seen(*ITEMS),
        }
        self._expected: dict[str, _Expected] = {}
        self._receipts: dict[str, list[Any]] = {}
        cluster.on_receipts = self._note_receipts

    async def send(
        self, group: str, payload: bytes, message_id: str, seconds: float | None
    ) -> Receipt:
        """Send a message, as JSON, to a group on every instance.

        When it returns, the message was put on the way to every local member. Waits up to
        ``seconds`` for Redis and the other instances; with None, not at all: the receipt is then
        of this instance alone. A repeated id that callers or the queue choose reaches nobody twice,
        and has the receipt of the first. Cancelling is safe and takes nothing back.

        Raises:
            Conflict: the id was used for a message that said something else.

        """
        receipt = Receipt(message_id)
        published = expected = None
        if message_id[0] in self._repeatable:
            found, _ = self._post_once(group, payload, message_id)
            if found is None:
                raise Conflict(CONFLICT)
            delivery = found
        else:
            delivery = self._gateway.post(group, payload)
        if self._mirror is not None:
            others = self._cluster.others
            if seconds is not None and others:
                expected = self._expected[message_id] = _Expected()
            published = self._mirror.publish(group, payload, message_id, others)
        try:
            await delivery
            receipt.shares[self._cluster.name] = self._share(group, delivery)
            if published is not None and self._mirror is not None:
                if seconds is None:
                    await asyncio.sleep(0)  # what cannot be sent is known at once
                    receipt.complete = False
                    receipt.fate = published.result().fate if published.done() else Fate.TAKEN
                else:
                    await self._collect(receipt, published, expected, seconds)
        finally:
            self._expected.pop(message_id, None)
        if any(share.conflict for share in receipt.shares.values()):
            raise Conflict(CONFLICT)
        return receipt

    def _post_once(
        self, group: str, payload: bytes, message_id: str
    ) -> tuple[Delivery | None, bool]:
        """Post a message to the local members unless they got it before.

        Returns what became of it, None where its id was used for another message, and whether it was
        posted now. One that nobody got is posted again: a member may have come meanwhile.
        """
        key, _, fingerprint = message_id.partition(".")
        seen, now = self._repeatable.get(message_id[0], self._recent), monotonic()
        first = seen.find(key, now)
        if first is not None:
            if first.fingerprint != fingerprint:
                return None, False
            if first.delivery.matched:
                return first.delivery, False
        delivery = self._gateway.post(group, payload)
        seen.note(key, _Sighting(fingerprint, delivery), now)
        return delivery, True

    async def _collect(
        self,
        receipt: Receipt,
        published: asyncio.Future[Published],
        expected: _Expected | None,
        seconds: float,
    ) -> None:
        """Wait for Redis, then for those that listen."""
        started = monotonic()
        deadline = started + seconds
        if not published.done():
            await asyncio.wait({published}, timeout=seconds)
        receipt.fate = published.result().fate if published.done() else Fate.UNKNOWN
        is_settled = self._mirror is not None and self._mirror.is_settled
        receipt.complete = receipt.fate is Fate.TAKEN and is_settled
        if receipt.fate is Fate.TAKEN and expected is not None:
            expected.missing = set(published.result().listeners)
            expected.settle()
            if not expected.answered.done():
                await asyncio.wait({expected.answered}, timeout=max(0, deadline - monotonic()))
            receipt.complete = is_settled and expected.answered.done()
        if expected is not None:
            receipt.shares |= expected.shares
            self._metrics.receipt_seconds.note(monotonic() - started)
        self._metrics.receipts_incomplete += not receipt.complete

    def deliver(self, group: str, found: Envelope | bytes) -> None:
        """Give what came through Redis to the local members of a group."""
        if isinstance(found, bytes):
            self._gateway.post(group, found)
            return
        delivery, is_new = self._post_once(group, found.payload, found.id)
        self._metrics.mirror_duplicates += not is_new
        if found.id[0] == envelope.QUIET:
            return
        if delivery is None:
            self._answer(found, Share(0, 0, 0, conflict=True))
        else:
            delivery.then(lambda done: self._answer(found, self._share(group, done)))

    def _share(self, group: str, delivery: Delivery) -> Share:
        users = tuple(users_in(self._gateway.hub)) if group == ALL else ()
        return Share(delivery.matched, delivery.written, delivery.dropped, users)

    def _answer(self, found: Envelope, share: Share) -> None:
        """Tell a message's sender what became of it, together with others of this turn."""
        waiting = self._receipts.setdefault(found.origin, [])
        if not waiting:
            asyncio.get_running_loop().call_soon(self._send_receipts, found.origin)
        waiting.append([found.id, *share])

    def _send_receipts(self, origin: str) -> None:
        receipts = self._receipts.pop(origin)
        self._cluster.tell(origin, {"type": "receipts", "receipts": receipts})

    def _note_receipts(self, sender: str, receipts: list[Any]) -> None:
        for message_id, matched, written, dropped, users, *conflict in receipts:
            expected = self._expected.get(message_id)
            if expected is not None:
                expected.shares[sender] = Share(
                    int(matched),
                    int(written),
                    int(dropped),
                    tuple(map(int, users)),
                    conflict == [True],
                )
                expected.settle()
