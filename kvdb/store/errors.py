"""Turns errors of the operating system and of LMDB into what a client sees."""

from __future__ import annotations

import errno

import lmdb

from kvdb.errors import KvdbError, MisconfError, NoSpaceError, SnapshotGoneError, StalePagesError

COMMIT = "commit"  # what a round was doing: its changes stay in memory
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def as_kvdb_error(error: BaseException, doing: str) -> KvdbError:
    """The error a command answers when `doing` failed with `error`."""
    if isinstance(error, KvdbError):
        return error
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        if error.errno in _FULL:
            return NoSpaceError(f"{doing}: {text}; free space or delete keys, then retry")
        if doing == COMMIT:
            return MisconfError(f"writes cannot be made durable: {text}; they are tried again")
        return KvdbError(f"{doing}: {text}")
    # py-lmdb reports the operating system's error as text only.
    if isinstance(error, lmdb.MapFullError) or "No space left" in str(error) or "Disk quota" in str(error):
        return NoSpaceError(f"{doing}: {error}; free space or delete keys, then retry")
    if isinstance(error, lmdb.Error):
        # A full disk may also end in a short write, which LMDB reports as an input/output error.
        return MisconfError(f"writes cannot be made durable: {error}; is the disk full? They are tried again")
    return KvdbError(f"{doing}: {type(error).__name__}: {error}")


__all__ = ["SnapshotGoneError", "StalePagesError", "as_kvdb_error"]
