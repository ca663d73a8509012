"""The fault seam: every file-system call of the store, and nothing else, goes through here.

Tests replace `OsFiles` by an implementation that records calls, injects errors and simulates power loss. The one
call that is not about a file we own, the commit of the index, passes through `commit` so that it can fail or stop
there too. Errors are OSError; `kvdb.store.errors` turns them into what a client sees.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kvdb_engine.writeback import start_writeback

Writable = bytearray | memoryview
Readable = bytes | bytearray | memoryview

_IOV_MAX = 1024  # buffers a call takes, on Linux and macOS
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux
_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2
_F_PUNCHHOLE = 99  # macOS <sys/fcntl.h>; its argument is struct fpunchhole
_F_FULLFSYNC = 51  # macOS: fsync alone leaves the bytes in the drive's cache


class Files(Protocol):
    """What the store asks of a file system. Every method raises OSError."""

    def make_dir(self, path: Path) -> None:
        """Create a directory and its parents; an existing one is fine."""

    def names(self, path: Path) -> list[str]:
        """Names in a directory, sorted."""

    def create(self, path: Path) -> int:
        """Create a file that must not exist; return a descriptor for reading and writing."""

    def open(self, path: Path, *, write: bool) -> int:
        """Open an existing file; return its descriptor."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def size(self, fd: int) -> int:
        """Length of a file in bytes."""

    def disk_bytes(self, fd: int) -> int:
        """Bytes the file system has allocated for a file (holes do not count)."""

    def read_into(self, fd: int, buffer: Writable, offset: int) -> int:
        """Fill the buffer from `offset`; return the bytes read, fewer only at the end of the file."""

    def read(self, fd: int, n_bytes: int, offset: int) -> bytes:
        """Up to `n_bytes` from `offset` as a new object, fewer only at the end of the file."""

    def read_cached(self, fd: int, buffer: Writable, offset: int) -> bool:
        """Fill the buffer if that needs no waiting for a disk; else False, and what is in it means nothing."""

    def write(self, fd: int, data: Readable, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def write_pieces(self, fd: int, pieces: Sequence[Readable], offset: int) -> None:
        """Write all of the pieces, one behind the other, at `offset`."""

    def start_writeback(self, fd: int, offset: int, n_bytes: int) -> None:
        """Begin to bring a range to the disk, so that a later datasync waits less. Promises nothing, never fails."""

    def datasync(self, fd: int) -> None:
        """Make a file's data and length survive power loss."""

    def sync_dir(self, path: Path) -> None:
        """Make the creation and removal of names in a directory survive power loss."""

    def truncate(self, fd: int, n_bytes: int) -> None:
        """Set a file's length."""

    def fs_bytes(self, fd: int) -> int:
        """Size of the file system that a file lies on."""

    def allocate(self, fd: int, n_bytes: int) -> None:
        """Make a file have this length and blocks for all of it."""

    def punch(self, fd: int, offset: int, n_bytes: int) -> bool:
        """Give a range's blocks back to the file system, keeping the length. False where that is unsupported."""

    def unlink(self, path: Path) -> None:
        """Remove a name."""

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source`, atomically."""

    def commit(self, commit: Callable[[], None]) -> None:
        """Run the index's commit."""


class OsFiles:
    """The operating system's files."""

    def make_dir(self, path: Path) -> None:
        """Create a directory and its parents; an existing one is fine."""
        path.mkdir(parents=True, exist_ok=True)

    def names(self, path: Path) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(entry.name for entry in path.iterdir())

    def create(self, path: Path) -> int:
        """Create a file that must not exist; return a descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, path: Path, *, write: bool) -> int:
        """Open an existing file; return its descriptor."""
        return os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def size(self, fd: int) -> int:
        """Length of a file in bytes."""
        return os.fstat(fd).st_size

    def disk_bytes(self, fd: int) -> int:
        """Bytes the file system has allocated for a file (holes do not count)."""
        return os.fstat(fd).st_blocks * 512

    def read_into(self, fd: int, buffer: Writable, offset: int) -> int:
        """Fill the buffer from `offset`; return the bytes read, fewer only at the end of the file."""
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            n_bytes = os.preadv(fd, [view[done:]], offset + done)
            if not n_bytes:
                break
            done += n_bytes
        return done

    def read(self, fd: int, n_bytes: int, offset: int) -> bytes:
        """Up to `n_bytes` from `offset` as a new object, fewer only at the end of the file."""
        data = os.pread(fd, n_bytes, offset)
        while len(data) < n_bytes and (more := os.pread(fd, n_bytes - len(data), offset + len(data))):
            data += more  # Linux reads at most 2 GiB at once
        return data

    def read_cached(self, fd: int, buffer: Writable, offset: int) -> bool:
        """Fill the buffer if that needs no waiting for a disk; else False, and what is in it means nothing."""
        if _NOWAIT is None:
            return False
        view = memoryview(buffer)
        try:
            return os.preadv(fd, [view], offset, _NOWAIT) == view.nbytes
        except OSError:
            return False  # not in the page cache, or a file system that cannot tell

    def write(self, fd: int, data: Readable, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        while view:
            n_bytes = os.pwrite(fd, view, offset)
            view, offset = view[n_bytes:], offset + n_bytes

    def write_pieces(self, fd: int, pieces: Sequence[Readable], offset: int) -> None:
        """Write all of the pieces, one behind the other, at `offset`."""
        # One call: a file system that knows how much comes takes larger pages, in half the time.
        left = [memoryview(piece).cast("B") for piece in pieces if piece]
        while left:
            n_bytes = os.pwritev(fd, left[:_IOV_MAX], offset)
            offset += n_bytes
            while n_bytes and n_bytes >= len(left[0]):
                n_bytes -= len(left.pop(0))
            if n_bytes:
                left[0] = left[0][n_bytes:]

    def start_writeback(self, fd: int, offset: int, n_bytes: int) -> None:
        """Begin to bring a range to the disk, so that a later datasync waits less. Promises nothing, never fails."""
        start_writeback(fd, offset, n_bytes)

    def datasync(self, fd: int) -> None:
        """Make a file's data and length survive power loss."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, _F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def sync_dir(self, path: Path) -> None:
        """Make the creation and removal of names in a directory survive power loss."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def truncate(self, fd: int, n_bytes: int) -> None:
        """Set a file's length."""
        os.ftruncate(fd, n_bytes)

    def fs_bytes(self, fd: int) -> int:
        """Size of the file system that a file lies on."""
        stat = os.fstatvfs(fd)
        return stat.f_blocks * stat.f_frsize

    def allocate(self, fd: int, n_bytes: int) -> None:
        """Make a file have this length and blocks for all of it."""
        if sys.platform == "darwin":
            self.write(fd, bytes(n_bytes), 0)
        else:
            os.posix_fallocate(fd, 0, n_bytes)

    def punch(self, fd: int, offset: int, n_bytes: int) -> bool:
        """Give a range's blocks back to the file system, keeping the length. False where that is unsupported."""
        try:
            _punch(fd, offset, n_bytes)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source`, atomically."""
        source.replace(target)

    def commit(self, commit: Callable[[], None]) -> None:
        """Run the index's commit."""
        commit()


def _unsupported() -> frozenset[int]:
    import errno

    return frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY})


_UNSUPPORTED = _unsupported()

if sys.platform == "darwin":

    def _punch(fd: int, offset: int, n_bytes: int) -> None:
        fcntl.fcntl(fd, _F_PUNCHHOLE, struct.pack("<IIqq", 0, 0, offset, n_bytes))

else:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def _punch(fd: int, offset: int, n_bytes: int) -> None:
        if _libc.fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, n_bytes):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
