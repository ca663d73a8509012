"""The change log: changes of keys that are on the disk before the index has them.

A commit of the index waits for the disk twice, one after the other: for its pages, and for the page that names their
root. A change of keys alone is durable as soon as it is in this log, which waits once. The log only runs ahead: the
next commit, a second later at most, takes all that was logged, and that makes the log void, since a record counts only
if it names the very transaction that the index stands at. So there is nothing to erase, and one truth at any moment:
the index, then the records that build on it.

The file has its whole length from the start, in zeros, and a record never shares a block of ALIGN bytes with another:
appending changes no file length, and what was answered is never written again.
"""

from __future__ import annotations

import logging
import struct
from pathlib import Path

from fastcrc.crc32 import iscsi as crc32c

from kvdb.store.files import Files

log = logging.getLogger("kvdb.store")

LOG_NAME = "changes.log"
LOG_BYTES = 4 << 20
ALIGN = 4096
# Larger changes go to the index at once: they would be written twice, and the second sync matters less to them.
MAX_RECORD_BYTES = 256 << 10

_MAGIC = b"KVCL"
_HEADER = struct.Struct("<4sIQQII")  # magic, crc32c of all behind it, index id, transaction, number, payload bytes
_CRC_END = 8
HEADER_BYTES = _HEADER.size


def encode_record(index_id: int, txn: int, number: int, changes: bytes) -> bytes:
    """A record as it lies in the log."""
    body = _HEADER.pack(_MAGIC, 0, index_id, txn, number, len(changes))[_CRC_END:] + changes
    return _MAGIC + crc32c(body).to_bytes(4, "little") + body


def decode_record(data: bytes | memoryview, index_id: int, txn: int, number: int) -> bytes | None:
    """The changes of the record that `data` begins with; None if it is not the one that is asked for, whole."""
    if len(data) < HEADER_BYTES:
        return None
    magic, crc, *names, n_bytes = _HEADER.unpack_from(data)
    end = HEADER_BYTES + n_bytes
    if magic != _MAGIC or names != [index_id, txn, number] or end > len(data):
        return None
    changes = bytes(data[_CRC_END:end])
    return changes[HEADER_BYTES - _CRC_END :] if crc32c(changes) == crc else None


class ChangeLog:
    """The file DATADIR/changes.log. Made when it is first needed. Commit thread, and start-up before it runs."""

    def __init__(self, folder: Path, files: Files, index_id: int) -> None:
        self._folder = folder
        self._path = folder / LOG_NAME
        self._files = files
        self._index_id = index_id
        self._fd = -1
        # Nothing is appended before the first commit: what a crash left there may not be in the index yet.
        self._txn: int | None = None
        self._number = 0
        self._offset = 0
        self._has_failed = False
        self.is_used = True

    def read(self, txn: int) -> tuple[list[bytes], str]:
        """The changes that build on a transaction, in order, and what is wrong behind them, in words. Raises OSError.

        A record that was cut while it was written is the last one, and was never answered.
        """
        try:
            fd = self._files.open(self._path, write=False)
        except FileNotFoundError:
            return [], ""
        try:
            data = memoryview(self._files.read(fd, LOG_BYTES, 0))
        finally:
            self._files.close(fd)
        found: list[bytes] = []
        offset = 0
        while (changes := decode_record(data[offset:], self._index_id, txn, len(found))) is not None:
            found.append(changes)
            offset += record_bytes(changes)
        for at in range(offset + ALIGN, len(data) - HEADER_BYTES, ALIGN):
            number = _HEADER.unpack_from(data, at)[4]
            if number > len(found) and decode_record(data[at:], self._index_id, txn, number) is not None:
                return found, f"record {len(found)} of {LOG_NAME} is damaged: record {number} behind it is whole"
        return found, ""

    def sync(self) -> None:
        """Make what `read` gave durable: a daemon that was killed may have left it in memory only. Raises OSError."""
        fd = self._files.open(self._path, write=True)
        try:
            self._files.datasync(fd)
        finally:
            self._files.close(fd)
        self._files.sync_dir(self._folder)

    def begin(self, txn: int) -> None:
        """The index has committed a transaction with everything that was logged, durably.

        is_used, from then on: whether the file may say something that the next commit must make void.
        """
        self._txn, self._number, self._offset = txn, 0, 0
        self.is_used = False

    def append(self, changes: bytes) -> bool:
        """Make changes durable; False if they must be committed instead: no room, or the log cannot be written."""
        if self._txn is None:
            return False
        record = encode_record(self._index_id, self._txn, self._number, changes)
        if len(record) > MAX_RECORD_BYTES or self._offset + len(record) > LOG_BYTES:
            return False
        self.is_used = True
        try:
            if self._fd < 0:
                self._fd = self._open()
            # Whole blocks: nothing need be read first.
            self._files.write(self._fd, record.ljust(record_bytes(changes), b"\0"), self._offset)
            self._files.datasync(self._fd)
        except OSError as error:
            self._give_up(error)
            return False
        if self._has_failed:
            log.info("%s is written again", self._path)
        self._has_failed = False
        self._number += 1
        self._offset += record_bytes(changes)
        return True

    def retract(self, changes: bytes) -> None:
        """Take the last record back, which had these changes: it is not answered after all."""
        self._number -= 1
        self._offset -= record_bytes(changes)
        try:
            self._files.write(self._fd, bytes(ALIGN), self._offset)
            self._files.datasync(self._fd)
        except OSError as error:
            log.error("%s keeps a change that was refused until the next commit: %s", self._path, error)

    def _open(self) -> int:
        """The file, durable with its name and length, whoever made it and was killed before that."""
        try:
            fd = self._files.open(self._path, write=True)
        except FileNotFoundError:
            fd = self._files.create(self._path)
        try:
            if self._files.size(fd) != LOG_BYTES:
                self._files.truncate(fd, 0)
                self._files.allocate(fd, LOG_BYTES)  # fails before it has written anything on a full disk
                self._files.write(fd, bytes(LOG_BYTES), 0)
                self._files.datasync(fd)
            self._files.sync_dir(self._folder)
        except OSError:
            self._files.close(fd)
            raise
        return fd

    def _give_up(self, error: OSError) -> None:
        """The round commits instead, which makes the log void: whether the record is on the disk does not matter."""
        if not self._has_failed:
            log.warning("%s cannot be written, each change is committed to the index: %s", self._path, error)
        self._has_failed = True
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._files.close(self._fd)
        self._fd = -1


def record_bytes(changes: bytes) -> int:
    """What a record takes in the file."""
    return -(-(HEADER_BYTES + len(changes)) // ALIGN) * ALIGN
