"""One daemon per data directory: an flock on DATADIR/LOCK.

The lock belongs to the open file, so it dies with the process however that ends; a stale LOCK file means nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kvdb.errors import KvdbError


class Lock:
    """Holds a data directory from construction to `release`. Raises KvdbError naming the process that has it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise KvdbError(f"{path.parent} is in use by process {holder or 'unknown'}: stop it first") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the directory up."""
        os.close(self._fd)
