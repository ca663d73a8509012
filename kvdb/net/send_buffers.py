"""What large strings are sent from: buffers that begin a page and are kept, of which few are large.

A string that is read and written by 4 MiB reaches a client of the same machine in three quarters of the time that it
takes by 256 KiB: while one write goes on, the kernel uses the memory of what the client has taken again, on the same
processor. But a client that does not read keeps its buffer. So no more than a few large ones are given out, and who
finds none free sends from a small one.
"""

from __future__ import annotations

import mmap

from kvdb.store.entries import PIECE_BYTES

# Room for a reply's header. A record's payload lies so far behind the beginning of a page, and so shall its copy: to a
# place a few bytes further on in a page than where they came from, AMD's processors copy at less than half the speed.
HEAD_BYTES = 64
TAIL_BYTES = 2
LARGE_BYTES = 16 * PIECE_BYTES
N_LARGE = 4


class SendBuffers:
    """Gives out buffers: HEAD_BYTES, room for whole pieces of a string, TAIL_BYTES. Event-loop thread."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []
        self._n_large = 0  # given out

    def take(self, *, may_be_large: bool) -> memoryview:
        """A buffer, to be given back or dropped. What is in it means nothing. Raises OSError if there is no memory."""
        if not may_be_large or self._n_large >= N_LARGE:
            return _new(PIECE_BYTES)
        buffer = self._free.pop() if self._free else _new(LARGE_BYTES)
        self._n_large += 1
        return buffer

    def give_back(self, buffer: memoryview) -> None:
        """Nobody reads from it or writes to it any more."""
        if _is_large(buffer):
            self._n_large -= 1
            self._free.append(buffer)

    def drop(self, buffer: memoryview) -> None:
        """Somebody may still read from it or write to it: its memory is freed when they let go of it."""
        if _is_large(buffer):
            self._n_large -= 1


def _new(n_bytes: int) -> memoryview:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, HEAD_BYTES + n_bytes + TAIL_BYTES, flags=flags))


def _is_large(buffer: memoryview) -> bool:
    return len(buffer) > LARGE_BYTES
