"""What can be wrong with a call, as its caller is told: status, sentence, code.

Only this module words errors of the HTTP API. None shows the text of an exception.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class Problem(Exception):
    """A call that fails: ``{"status": "error", "message", "code", "field"?}``.

    ``retry_after`` is in seconds.
    """

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def document(self) -> dict[str, Any]:
        """What the caller gets."""
        document = {"status": "error", "message": self.message, "code": self.code}
        return document if self.field is None else {**document, "field": self.field}


def missing(field: str) -> Problem:
    return Problem(HTTPStatus.BAD_REQUEST, "missing", "缺少必要参数", field=field)


def invalid(field: str, reason: str) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid", reason, field=field)


def malformed(reason: str) -> Problem:
    return Problem(HTTPStatus.BAD_REQUEST, "malformed", reason)


def unauthorized() -> Problem:
    return Problem(HTTPStatus.UNAUTHORIZED, "unauthorized", "a key is needed, and this is none")


def forbidden(reason: str) -> Problem:
    return Problem(HTTPStatus.FORBIDDEN, "forbidden", reason)


def not_found(what: str, field: str | None = None) -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "not_found", what, field=field)


def offline() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "offline", "nobody is connected")


def conflict(reason: str) -> Problem:
    return Problem(HTTPStatus.CONFLICT, "conflict", reason)


def unusable(reason: str) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "configuration", reason)


def too_large(reason: str) -> Problem:
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", reason)


def unavailable(message: str = "消息发送失败", retry_after: int = 2) -> Problem:
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", message, retry_after=retry_after)


def unknown() -> Problem:
    return Problem(
        HTTPStatus.GATEWAY_TIMEOUT, "unknown", "sent or not: repeat with the same Idempotency-Key"
    )
