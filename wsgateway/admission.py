"""Who may come in now.

Only this module decides about a handshake: its path, origin, token, and whether there is room. It
knows neither SQL nor how bytes travel; it answers through the connection.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from http import HTTPStatus
from time import monotonic

from wsgateway import handshake
from wsgateway.auth import Authenticator, Identity
from wsgateway.config import Config
from wsgateway.connection import Connection, Phase
from wsgateway.errors import Refused
from wsgateway.gateway import ALL, Gateway, user_group
from wsgateway.handshake import Route, Visit
from wsgateway.health import Health
from wsgateway.limits import Departed
from wsgateway.metrics import Metrics
from wsgateway.session import Rules, Session
from wsgateway.wire import CloseCode

log = logging.getLogger(__name__)

RETRY_AFTER = (1, 5)
"""Seconds, drawn anew for each refusal, so that a refused crowd does not come back as one."""

MISMATCHES_REMEMBERED = 1000
"""Users whose wrong path was logged; beyond, mismatches are only counted."""


class Admission:
    """Decides about handshakes, and counts addresses."""

    def __init__(
        self,
        config: Config,
        authenticator: Authenticator,
        gateway: Gateway,
        rules: Rules,
        health: Health,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._health = health
        self._authenticator = authenticator
        self._gateway = gateway
        self._rules = rules
        self._metrics = metrics
        limits = config.limits
        self.departed = Departed(limits.messages, limits.window, limits.remembered_windows)
        self._addresses: Counter[str] = Counter()
        self._mismatched: set[int] = set()
        self.draining = False
        """Whether nobody is let in any more."""

    def configure(self, config: Config) -> None:
        """Judge from now on by another configuration. Never waits.

        Where the message window changed, every device begins a new one: those that are connected
        would otherwise be cut for what they sent when it was allowed.
        """
        self._config = config
        self._rules.message_characters = config.limits.message_characters
        self._rules.handler_timeout = config.handlers.timeout
        limits = config.limits
        if self.departed.configure(limits.messages, limits.window, limits.remembered_windows):
            for member in self._gateway.hub.members(ALL):
                if isinstance(member, Connection) and member.session is not None:
                    member.session.window = self.departed.new()

    async def decide(self, connection: Connection, visit: Visit, refusal: str | None) -> None:
        """Answer a handshake request; ``refusal`` is why there is no room for it, if so.

        Cancelling is safe: the connection is then left to its deadline.
        """
        if visit.route is not Route.DEVICE:
            connection.respond(self._plain(visit))
            return
        if not visit.valid:
            self._metrics.refused["bad_request"] += 1
            connection.respond(visit.answer)
            return
        try:
            if refusal:
                raise Refused(refusal, random.randint(*RETRY_AFTER))  # noqa: S311 - spreads retries
            identity = await self._identify(visit)
            async with self._gateway.arriving(
                identity.user_id, identity.device_id, self._config.redis.subscribe_timeout
            ):
                if connection.phase is Phase.DECIDING:
                    self._admit(connection, visit.answer, identity)
        except Refused as error:
            self._refuse(connection, visit, error)
        except Exception:
            log.exception("connecting a device failed id=%s", connection.id)
            self._metrics.refused["internal"] += 1
            if visit.versioned:
                connection.accept(visit.answer)
                connection.close(CloseCode.CONNECT_FAILED)
            else:
                error_response = {"error": "internal"}
                connection.respond(
                    handshake.json_response(HTTPStatus.INTERNAL_SERVER_ERROR, error_response)
                )

    def enter(self, connection: Connection) -> None:
        """Count a connection that was accepted."""
        self._addresses[connection.address] += 1

    def move(self, connection: Connection, address: str) -> None:
        """Count a connection under the address that its proxy told."""
        self._forget_address(connection)
        connection.address = address
        self.enter(connection)

    def leave(self, connection: Connection) -> None:
        """Forget a connection that is lost, except for what its device may still send."""
        self._forget_address(connection)
        identity, session = connection.identity, connection.session
        if identity is not None and session is not None:
            self._gateway.leave(connection, identity.user_id, identity.device_id)
            self.departed.leave(_owner(identity), session.window, monotonic())
            self._metrics.forgotten_windows = self.departed.forgotten

    def crowded(self, connection: Connection) -> bool:
        """Whether a connection's address has more than it may have."""
        limit = self._config.limits.connections_per_ip
        return bool(limit) and self._addresses[connection.address] > limit

    def _forget_address(self, connection: Connection) -> None:
        self._addresses[connection.address] -= 1
        if not self._addresses[connection.address]:
            del self._addresses[connection.address]

    def _plain(self, visit: Visit) -> bytes:
        if visit.route is Route.NOWHERE:
            self._metrics.refused["not_found"] += 1
            return handshake.json_response(HTTPStatus.NOT_FOUND, {"error": "not found"})
        if visit.method not in ("GET", "HEAD"):
            refusal = {"error": "use GET"}
            return handshake.json_response(
                HTTPStatus.METHOD_NOT_ALLOWED, refusal, "Allow: GET, HEAD"
            )
        document = self._health.readiness() if visit.route is Route.READY else {"status": "ok"}
        unavailable = document["status"] == "unavailable"
        return handshake.json_response(
            HTTPStatus.SERVICE_UNAVAILABLE if unavailable else HTTPStatus.OK,
            document,
            head=visit.method == "HEAD",
        )

    async def _identify(self, visit: Visit) -> Identity:
        """Whom the request comes from. Raises Refused."""
        auth = self._config.auth
        if "*" not in auth.origins:
            absent_is_fine = visit.origin is None and not auth.require_origin
            if not absent_is_fine and visit.origin not in auth.origins:
                raise Refused("origin")
        if visit.token is None:
            raise Refused("missing")
        identity = await self._authenticator.identify(visit.token)
        if visit.path_user_id not in (None, identity.user_id):
            self._note_mismatch(identity.user_id)
            if auth.strict_path_id:
                raise Refused("path_id")
        return identity

    def _admit(self, connection: Connection, answer: bytes, identity: Identity) -> None:
        if self.draining:
            raise Refused("draining", random.randint(*RETRY_AFTER))  # noqa: S311
        limits, now = self._config.limits, monotonic()
        group = user_group(identity.user_id)
        replaced = self._replaced(identity) if limits.duplicate == "newest" else []
        others = len(self._gateway.hub.members(group)) - len(replaced)
        if 0 < limits.connections_per_user <= others:
            raise Refused("user_full", random.randint(*RETRY_AFTER))  # noqa: S311
        window = self.departed.inherit(_owner(identity), now)
        wait = window.wait(now)
        if wait > 0:
            raise Refused("rate", int(wait) + 1)
        for other in replaced:
            other.close(CloseCode.REPLACED)
        if identity.device_id is None:
            log.warning("device has no id: user has no primary device user=%s", identity.user_id)
        session = Session(self._rules, window, connection)
        connection.open(answer, identity, session)
        if connection.phase is Phase.OPEN:
            self._gateway.join(connection, identity.user_id, identity.device_id)
            self._metrics.opened += 1
            log.info(
                "device in user=%s device=%s address=%s id=%s",
                identity.user_id, identity.device_id, connection.address, connection.id,
            )  # fmt: skip
            connection.listen()

    def _replaced(self, identity: Identity) -> list[Connection]:
        """The user's connections that a new one of the same device, or token, replaces."""
        return [
            member
            for member in self._gateway.hub.members(user_group(identity.user_id))
            if isinstance(member, Connection) and _same(member.identity, identity)
        ]

    def _refuse(self, connection: Connection, visit: Visit, error: Refused) -> None:
        self._metrics.refused[error.reason] += 1
        log.warning(
            "device refused reason=%s address=%s id=%s",
            error.reason, connection.address, connection.id,
        )  # fmt: skip
        if error.retry_after is not None:
            connection.respond(handshake.unavailable(error.retry_after))
        elif error.reason != "origin" and (visit.versioned or self._config.auth.refuse == "close"):
            connection.accept(visit.answer)
            connection.close(CloseCode.TOKEN_ENDED)
        else:
            connection.respond(handshake.unauthorized())

    def _note_mismatch(self, user_id: int) -> None:
        self._metrics.path_id_mismatches += 1
        if user_id not in self._mismatched and len(self._mismatched) < MISMATCHES_REMEMBERED:
            self._mismatched.add(user_id)
            log.warning("device names another user in its path user=%s", user_id)


def _same(one: Identity | None, other: Identity) -> bool:
    if one is None or other.device_id is None:
        return one is not None and one.token_hash == other.token_hash
    return one.device_id == other.device_id


def _owner(identity: Identity) -> tuple[int, int | None]:
    """Whose message budget it is."""
    return identity.token_id, identity.device_id
