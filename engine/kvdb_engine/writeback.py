"""Begin to bring written bytes to the disk before somebody waits for them.

A later sync then finds most of its work done. It also helps when that sync follows at once: measured on ext4, a new
mebibyte that was written by one call took 0.9 or, for minutes on end, 3.3 ms to sync, and 0.8 ms after this.
"""

from __future__ import annotations

import ctypes
import sys

_SYNC_FILE_RANGE_WRITE = 2

if sys.platform == "linux":
    _sync_file_range = ctypes.CDLL(None).sync_file_range
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def start_writeback(fd: int, offset: int, n_bytes: int) -> None:
        """Promises nothing, never fails: it is fdatasync that counts."""
        _sync_file_range(fd, offset, n_bytes, _SYNC_FILE_RANGE_WRITE)

else:

    def start_writeback(fd: int, offset: int, n_bytes: int) -> None:
        """The system has no such call."""
