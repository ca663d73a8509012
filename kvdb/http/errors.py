"""Errors of the gateway, and how each dialect shows them.

A `BadRequest` is the client's mistake; everything else is a KvdbError and gets its status from the table below. Both
dialects give the same status; only the body's shape differs.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

from kvdb.errors import (
    BusyError,
    CancelledError,
    EngineDownError,
    KvdbError,
    LoadingError,
    MisconfError,
    NoAuthError,
    NoEngineError,
    NoPermError,
    NoSpaceError,
    TooLongError,
    WrongModelError,
    WrongPassError,
    WrongTypeError,
)

log = logging.getLogger("kvdb.http")


class BadRequest(KvdbError):
    """The request is wrong. param: the field; status: 400 unless it is something else, as 404 for an unknown model."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


# (class, status, OpenAI type, Anthropic type); the first that fits
_TABLE: tuple[tuple[type[KvdbError], int, str, str], ...] = (
    (TooLongError, 400, "invalid_request_error", "invalid_request_error"),
    (WrongTypeError, 409, "invalid_request_error", "invalid_request_error"),
    (WrongModelError, 409, "invalid_request_error", "invalid_request_error"),
    (NoAuthError, 401, "authentication_error", "authentication_error"),
    (WrongPassError, 401, "authentication_error", "authentication_error"),
    (NoPermError, 403, "permission_error", "permission_error"),
    (BusyError, 503, "server_error", "overloaded_error"),
    (LoadingError, 503, "server_error", "overloaded_error"),
    (EngineDownError, 503, "server_error", "overloaded_error"),
    (NoEngineError, 503, "server_error", "api_error"),
    (MisconfError, 503, "server_error", "api_error"),
    (NoSpaceError, 507, "server_error", "api_error"),
    (CancelledError, 499, "cancelled", "api_error"),
)
_ANTHROPIC_BY_STATUS = {404: "not_found_error", 413: "request_too_large"}


def seen(error: BaseException) -> KvdbError:
    """An error as the client may see it: anything unexpected gets a number that is in the log."""
    if isinstance(error, KvdbError):
        return error
    number = secrets.token_hex(4)
    log.error("internal error %s", number, exc_info=error)
    return KvdbError(f"internal error {number}; the server's log has the details")


def status_of(error: KvdbError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, BadRequest):
        return error.status
    return next((status for kind, status, _, _ in _TABLE if isinstance(error, kind)), 500)


def openai_body(error: KvdbError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    if isinstance(error, BadRequest):
        kind, param, code = "invalid_request_error", error.param, error.code
    else:
        kind = next((name for known, _, name, _ in _TABLE if isinstance(error, known)), "server_error")
        param = None
        code = "context_length_exceeded" if isinstance(error, TooLongError) else error.word.lower()
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def anthropic_body(error: KvdbError) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    if isinstance(error, BadRequest):
        kind = _ANTHROPIC_BY_STATUS.get(error.status, "invalid_request_error")
    else:
        kind = next((name for known, _, _, name in _TABLE if isinstance(error, known)), "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}
