"""What the client raises when a command fails: one exception class for each error word of the server.

redis-py keeps a table from error word to exception class (`BaseParser.EXCEPTION_CLASSES`). The parsers here carry that
table with kvdb's words added, so errors inside pipelines and transactions are mapped as well; other redis-py clients of
the process keep their own table. Words that redis-py maps already (NOAUTH, READONLY, LOADING ...) keep its classes, and
words that neither knows (ERR, WRONGTYPE) raise plain ResponseError, as with Redis.

ResponseError                        redis-py
└── StateError                       base of all below; `word`, `retryable`
    ├── WrongModelError  WRONGMODEL  the state belongs to another model family or rounding
    ├── CorruptError     CORRUPT     stored bytes fail their checksum; other keys keep serving
    ├── NoSpaceError     NOSPACE     disk or `maxstore` is full; nothing was written
    ├── TooLongError     TOOLONG     more tokens than the model's context
    ├── NoEngineError    NOENGINE    no model can be run there
    ├── EngineDownError  ENGINEDOWN  the worker died or was restarted; a retry can help
    ├── CancelledError   CANCELLED   the work was cancelled; the session stands at its last complete token
    ├── BusyError        BUSY        the session or the queue is occupied; a retry can help
    ├── BusyKeyError     BUSYKEY     the target key exists
    └── MisconfError     MISCONF     writes cannot be made durable at the moment; a retry can help
"""

from __future__ import annotations

from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.connection import DefaultParser
from redis.exceptions import ResponseError


class StateError(ResponseError):
    """An error reply of kvdb. `word` is its first word; `retryable` says whether the same call may succeed later."""

    word = "ERR"
    retryable = False


class WrongModelError(StateError):
    """The state belongs to another model family or rounding."""

    word = "WRONGMODEL"


class CorruptError(StateError):
    """Stored bytes fail their checksum."""

    word = "CORRUPT"


class NoSpaceError(StateError):
    """Disk or budget is full; nothing was written."""

    word = "NOSPACE"


class TooLongError(StateError):
    """More tokens than the model's context."""

    word = "TOOLONG"


class NoEngineError(StateError):
    """No model can be run there."""

    word = "NOENGINE"


class EngineDownError(StateError):
    """The engine worker died or was restarted."""

    word = "ENGINEDOWN"
    retryable = True


class CancelledError(StateError):
    """The work was cancelled at a chunk border."""

    word = "CANCELLED"


class BusyError(StateError):
    """The session or the queue is occupied."""

    word = "BUSY"
    retryable = True


class BusyKeyError(StateError):
    """The target key exists."""

    word = "BUSYKEY"


class MisconfError(StateError):
    """Writes cannot be made durable at the moment."""

    word = "MISCONF"
    retryable = True


STATE_ERRORS: dict[str, type[StateError]] = {
    error.word: error
    for error in (
        WrongModelError,
        CorruptError,
        NoSpaceError,
        TooLongError,
        NoEngineError,
        EngineDownError,
        CancelledError,
        BusyError,
        BusyKeyError,
        MisconfError,
    )
}


class Parser(DefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's parser with kvdb's error words."""

    EXCEPTION_CLASSES = {**DefaultParser.EXCEPTION_CLASSES, **STATE_ERRORS}  # noqa: RUF012


class AsyncParser(AsyncDefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's asyncio parser with kvdb's error words."""

    EXCEPTION_CLASSES = {**AsyncDefaultParser.EXCEPTION_CLASSES, **STATE_ERRORS}  # noqa: RUF012
