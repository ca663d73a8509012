"""Ballast: a few allocated megabytes that are given up when the disk is full.

Deleting needs space too: the index is copy-on-write. On a full disk nothing could be deleted any more. So a file of
up to BALLAST_BYTES is kept; when a commit meets a full disk it is emptied, and the commit of what is pending,
deletions above all, is tried once more. New writes stay refused until the ballast could be allocated again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from kvdb.store.files import Files

log = logging.getLogger("kvdb.store")

BALLAST_BYTES = 8 << 20
FS_SHARE = 64  # and at most this part of a small file system


class Ballast:
    """The file DATADIR/ballast. Commit thread, and start-up before it runs."""

    def __init__(self, path: Path, files: Files) -> None:
        self._path = path
        self._files = files
        self.is_full = False

    def fill(self) -> bool:
        """Allocate the ballast if it is not there; False while the disk has no room for it."""
        if self.is_full:
            return True
        try:
            exists = self._path.exists()
            fd = self._files.open(self._path, write=True) if exists else self._files.create(self._path)
            try:
                n_bytes = min(BALLAST_BYTES, self._files.fs_bytes(fd) // FS_SHARE)
                self._files.truncate(fd, n_bytes)
                self._files.allocate(fd, n_bytes)
            finally:
                self._files.close(fd)
        except OSError:
            self.drop()
            return False
        self.is_full = True
        return True

    def drop(self) -> bool:
        """Give the ballast up; whether there was any."""
        had, self.is_full = self.is_full, False
        try:
            fd = self._files.open(self._path, write=True)
            try:
                self._files.truncate(fd, 0)
            finally:
                self._files.close(fd)
        except OSError as error:
            log.warning("cannot give up the ballast: %s", error)
            return False
        return had
