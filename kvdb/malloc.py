"""Keeps the C library from returning memory to the system that the next request needs again."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Freed memory that is kept, and the size from which an object gets pages of its own, given back when it is freed: a
# prompt of a million ids is 4 MiB.
KEPT_BYTES = 16 << 20
OWN_PAGES_BYTES = 8 << 20


def keep_freed_memory() -> bool:
    """Keep up to KEPT_BYTES of freed memory; False where the C library has no such setting.

    glibc gives back what is more than twice the largest object it has seen so far. Pieces of 256 KB that make up a
    value of a megabyte then cost 250 page faults a value, and their opposite: a fifth of a durable SET on a virtual
    machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, OWN_PAGES_BYTES))
