"""Every error a client can see, and its first word on the wire.

KvdbError                ERR         base; "ERR" where Redis says ERR
├── SnapshotGoneError    ERR         the snapshot was deleted meanwhile
├── WrongTypeError       WRONGTYPE   the key holds another type
├── WrongModelError      WRONGMODEL  the state belongs to another model family or rounding
├── CorruptError         CORRUPT     stored bytes fail their checksum; other keys keep serving
├── NoSpaceError         NOSPACE     disk or `maxstore` is full; nothing was written
├── TooLongError         TOOLONG     more tokens than the model's context
├── NoEngineError        NOENGINE    no model can be run here
├── EngineDownError      ENGINEDOWN  the worker died or was restarted; a retry can help
├── CancelledError       CANCELLED   the work was cancelled at a chunk border
├── LoadingError         LOADING     starting up; a retry can help
├── BusyError            BUSY        the session or the queue is occupied; a retry can help
│   └── StalePagesError  BUSY        pages believed stored were freed meanwhile; writing them again helps
├── BusyKeyError         BUSYKEY     the target key exists
├── NoAuthError          NOAUTH      authenticate first
├── WrongPassError       WRONGPASS   bad user or password
├── NoPermError          NOPERM      the ACL says no
├── NoProtoError         NOPROTO     unsupported protocol version
├── ReadOnlyError        READONLY    the store refuses writes
├── ExecAbortError       EXECABORT   a queued command was bad
└── MisconfError         MISCONF     writes cannot be made durable at the moment

Messages say what happened, to which name, and what to do.
"""

from __future__ import annotations


class KvdbError(Exception):
    """An error reply. `word` is its first word, `retryable` says whether the same call may succeed later."""

    word = "ERR"
    retryable = False

    @property
    def wire(self) -> str:
        """The error line without the leading dash: CR and LF cannot appear in it."""
        return f"{self.word} {self}".replace("\r", " ").replace("\n", " ")


class WrongTypeError(KvdbError):
    """The key holds another type."""

    word = "WRONGTYPE"

    def __init__(self, message: str = "Operation against a key holding the wrong kind of value") -> None:
        super().__init__(message)


class WrongModelError(KvdbError):
    """The state belongs to another model family or rounding."""

    word = "WRONGMODEL"


class CorruptError(KvdbError):
    """Stored bytes fail their checksum."""

    word = "CORRUPT"


class NoSpaceError(KvdbError):
    """Disk or budget is full; nothing was written."""

    word = "NOSPACE"


class TooLongError(KvdbError):
    """More tokens than the model's context."""

    word = "TOOLONG"


class NoEngineError(KvdbError):
    """No model can be run here."""

    word = "NOENGINE"


class EngineDownError(KvdbError):
    """The worker died or was restarted."""

    word = "ENGINEDOWN"
    retryable = True


class CancelledError(KvdbError):
    """The work was cancelled at a chunk border."""

    word = "CANCELLED"


class LoadingError(KvdbError):
    """The daemon is starting up."""

    word = "LOADING"
    retryable = True


class BusyError(KvdbError):
    """The session or the queue is occupied."""

    word = "BUSY"
    retryable = True


class StalePagesError(BusyError):
    """A page that the writer skipped as stored was freed meanwhile: ask again what is known, then write."""


class SnapshotGoneError(KvdbError):
    """The snapshot was deleted meanwhile."""


class BusyKeyError(KvdbError):
    """The target key exists."""

    word = "BUSYKEY"

    def __init__(self, message: str = "Target key name already exists.") -> None:
        super().__init__(message)


class NoAuthError(KvdbError):
    """Authenticate first."""

    word = "NOAUTH"


class WrongPassError(KvdbError):
    """Bad user or password."""

    word = "WRONGPASS"


class NoPermError(KvdbError):
    """The ACL says no."""

    word = "NOPERM"


class NoProtoError(KvdbError):
    """Unsupported protocol version."""

    word = "NOPROTO"


class ReadOnlyError(KvdbError):
    """The store refuses writes."""

    word = "READONLY"


class ExecAbortError(KvdbError):
    """A queued command was bad."""

    word = "EXECABORT"


class MisconfError(KvdbError):
    """Writes cannot be made durable at the moment."""

    word = "MISCONF"
    retryable = True
